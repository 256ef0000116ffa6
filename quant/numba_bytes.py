"""What a dequantising kernel reads of a block and writes of weights, sixteen lanes at a time.

Places count bytes from an array's start, of any alignment; the machine is little-endian, as GGUF
is. A scalar read is one instruction, `look_up` a shuffle of bytes on x86.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable

from .numba_jit import FEATURES
from .numba_memory import pointer
from .numba_vector import (
    BYTES,
    FLOATS,
    INTS,
    LANES,
    LOWERED,
    MASK,
    WORD,
    BFloat,
    call,
    constant,
    define,
    helper,
    spread,
)

_SHORT, _LONG = ir.IntType(16), ir.IntType(64)
_SHORTS, _HALF = ir.VectorType(_SHORT, LANES), ir.HalfType()
_AHEAD, _LINE = 2048, 64  # bytes: how far ahead of a block is fetched; and a line of the cache


def half(array, at):
    """float32: the IEEE half at byte `at` of uint8."""


def short(array, at):
    """int64: two bytes, unsigned."""


def word(array, at):
    """int64: four bytes, unsigned."""


def long(array, at):
    """int64: eight bytes."""


def load_signed(array, at):
    """Sixteen int8 from byte `at` of uint8 on, as int32."""


def _reads(function: Callable, result: types.Type, memory: ir.Type) -> Callable:
    """Type `function(array of uint8, place)`; what is decorated converts `memory` to `result`."""

    def typed(array, at):
        bytes_ = isinstance(array, types.Array) and array.dtype == types.uint8
        return signature(result, array, types.intp) if bytes_ else None

    type_callable(function)(lambda context: typed)

    def decorate(convert):
        @lower_builtin(function, types.Array, types.intp)
        def _(context, builder, sig, args):
            place = pointer(context, builder, sig.args[0], *args, memory)
            return convert(builder, builder.load(place, align=1))

    return decorate


_reads(half, types.float32, _HALF)(lambda builder, v: builder.fpext(v, ir.FloatType()))
_reads(short, types.int64, _SHORT)(lambda builder, v: builder.zext(v, _LONG))
_reads(word, types.int64, WORD)(lambda builder, v: builder.zext(v, _LONG))
_reads(long, types.int64, _LONG)(lambda builder, v: v)
_reads(load_signed, INTS, BYTES)(lambda builder, v: builder.sext(v, LOWERED[INTS]))


def join(low, high):
    """The eight int8 of an int64, and those of another, as int32."""


def lanes_of(bits):
    """The mask that is set in lane j where bit j of an int64 is."""


@type_callable(join)
def _(context):
    return lambda low, high: signature(INTS, types.int64, types.int64)


@lower_builtin(join, types.int64, types.int64)
def _(context, builder, sig, args):
    pair = ir.Constant(ir.VectorType(_LONG, 2), ir.Undefined)
    for lane, value in enumerate(args):
        pair = builder.insert_element(pair, value, ir.Constant(WORD, lane))
    return builder.sext(builder.bitcast(pair, BYTES), LOWERED[INTS])


@type_callable(lanes_of)
def _(context):
    return lambda bits: signature(MASK, types.int64)


@lower_builtin(lanes_of, types.int64)
def _(context, builder, sig, args):
    return builder.bitcast(builder.trunc(args[0], _SHORT), LOWERED[MASK])


def prefetch(array, at):
    """Have the cache line of byte `at` of uint8 fetched; past the end it is no error."""


@type_callable(prefetch)
def _(context):
    return lambda array, at: signature(types.none, array, types.intp)


@lower_builtin(prefetch, types.Array, types.intp)
def _(context, builder, sig, args):
    place = pointer(context, builder, sig.args[0], *args, ir.IntType(8))
    to_read, nearest, data = (ir.Constant(WORD, n) for n in (0, 3, 1))
    call(builder, "llvm.prefetch.p0i8", ir.VoidType(), place, to_read, nearest, data)
    return context.get_dummy_value()


@helper
def block(data, b, size, weights):
    """Where block b of `size` bytes begins, and where its weights go. The processor fetches ahead
    by itself, but not past the end of a page of memory; so what comes next is fetched here.
    """
    for line in range(0, size, _LINE):
        prefetch(data, size * b + _AHEAD + line)
    return size * b, weights * b


def look_up(values: Sequence[int]) -> Callable:
    """A function of an int32 vector of 0 … 15: values[lane], sixteen int8, as int32."""

    def looked(v):
        """As `look_up` says."""

    table = ir.Constant(BYTES, [int(value) for value in values])

    @define(looked, INTS, INTS)
    def _(builder, v):
        v = builder.trunc(v, BYTES)
        if FEATURES.get("ssse3"):
            found = call(builder, "llvm.x86.ssse3.pshuf.b.128", BYTES, table, v)
        else:
            found = ir.Constant(BYTES, [int(values[0])] * LANES)
            for k in range(1, LANES):
                same = builder.icmp_signed("==", v, ir.Constant(BYTES, [k] * LANES))
                value = ir.Constant(BYTES, [int(values[k])] * LANES)
                found = builder.select(same, value, found)
        return builder.sext(found, LOWERED[INTS])

    return looked


def put(array, at, v):
    """Sixteen float32 into an array of float32, or, rounded half to even, into one of uint16:
    bfloat16's bits. NaN stays NaN; subnormal numbers may become zeros.

    Into an array of int32 or int16 that begins with a line of the cache the same bits go past the
    cache, to memory, and do not fetch first what they write over; `at` is whole sixteens.
    """


def put_subnormal(array, at, v):
    """As `put`, but subnormal numbers stay what they are."""


_KEPT, _STREAMED = (types.float32, types.uint16), (types.int32, types.int16)


def _writes(function: Callable, rounded: Callable) -> None:
    """Type and lower it; `rounded` makes bfloat16's bits of a vector."""

    def typed(array, at, v):
        fits = isinstance(array, types.Array) and array.dtype in _KEPT + _STREAMED
        return signature(types.none, array, types.intp, v) if fits and v == FLOATS else None

    type_callable(function)(lambda context: typed)

    @lower_builtin(function, types.Array, types.intp, FLOATS)
    def _(context, builder, sig, args):
        (kind, *_), (array, at, v) = sig.args, args
        bits = v if kind.dtype in (types.float32, types.int32) else rounded(builder, v)
        place = pointer(context, builder, kind, array, at, bits.type)
        size = kind.dtype.bitwidth // 8
        if kind.dtype in _KEPT:
            builder.store(bits, place, align=size)
            return context.get_dummy_value()
        if bits.type == _SHORTS:
            # LLVM has no such store of bfloat16, and would see that these are: so it is made to
            # add a zero, of which it does not know that it is one.
            start = context.make_array(kind)(context, builder, array).data
            zero = builder.and_(builder.ptrtoint(start, _SHORT), ir.Constant(_SHORT, 32))
            bits = builder.or_(bits, spread(builder, zero))
        stored = builder.store(bits, place, align=size * LANES)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(WORD, 1)]))
        return context.get_dummy_value()


def _by_integers(builder, v):
    bits = builder.bitcast(v, LOWERED[INTS])
    odd = builder.and_(builder.lshr(bits, constant(INTS, 16)), constant(INTS, 1))
    rounded = builder.add(builder.add(bits, constant(INTS, 0x7FFF)), odd)
    nan = builder.fcmp_unordered("uno", v, v)
    rounded = builder.select(nan, constant(INTS, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, constant(INTS, 16)), _SHORTS)


def _by_instruction(builder, v):
    name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
    return builder.bitcast(call(builder, name, ir.VectorType(BFloat(), LANES), v), _SHORTS)


_writes(put, _by_instruction if FEATURES.get("avx512bf16") else _by_integers)
_writes(put_subnormal, _by_integers)
