"""Products of bfloat16 in Intel's AMX: eight registers of sixteen rows of sixty-four bytes.

Four of them hold sums, of 32 rows and 32 columns or (`add_sums`) 16 and 64; the others the factors,
sixteen pairs deep. Their shapes are set for a thread: others who use it (torch's own products do)
may count on what they set, so `hold` keeps that and `release` sets it again.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable

from .numba_memory import pointer
from .numba_vector import BYTE, call, helper

ROWS, COLUMNS = 32, 2  # of a tile of sums, the columns in vectors
_SIDE, _WIDTH = 16, 64  # rows of a register, and a row's bytes
_SHAPES = np.zeros(64, np.uint8)
_SHAPES[0] = 1  # palette
_SHAPES[16:32:2], _SHAPES[48:56] = _WIDTH, _SIDE
_A, _B = 4, 6  # the factors' first registers
SUMS = _A  # of `add_sums`, at the most


def _read(shapes):
    """The registers' shapes into `shapes`, (64,) uint8."""


def _set(shapes):
    """Set them; what was in the registers is lost."""


for _function, _name in ((_read, "sttilecfg"), (_set, "ldtilecfg")):
    type_callable(_function)(lambda context: lambda shapes: signature(types.none, shapes))

    @lower_builtin(_function, types.Array)
    def _(context, builder, sig, args, name=_name):
        first = ir.Constant(ir.IntType(64), 0)
        _do(builder, name, pointer(context, builder, sig.args[0], args[0], first, BYTE))
        return context.get_dummy_value()


@helper
def hold():
    """Take this thread's registers -> what `release` wants."""
    kept = np.empty(64, np.uint8)
    _read(kept)
    _set(_SHAPES)
    return kept


@helper
def release(kept):
    """Give them back."""
    _set(kept)


def zero_sums():
    """Set four registers of sums to zero; until `store_sums` they are to be left alone."""


def add_sums(n, a, at, b, b_at, b_step):
    """Sum c += a · b, for c < n: sixteen rows of sixteen pairs, from a[at] on, one after the other;
    and of b the sixteen columns of pairs from b_at + c·b_step on.
    """


def store_sums(n, out, at, step):
    """Put the first n, side by side, into rows that are `step` apart."""


_PLACE = (types.intp, types.intp)


@type_callable(zero_sums)
def _(context):
    return lambda: signature(types.none)


@type_callable(add_sums)
def _(context):
    return lambda n, a, at, b, b_at, b_step: signature(
        types.none, types.intp, a, types.intp, b, *_PLACE
    )


@type_callable(store_sums)
def _(context):
    return lambda n, out, at, step: signature(types.none, types.intp, out, *_PLACE)


@lower_builtin(zero_sums)
def _(context, builder, sig, args):
    for c in range(SUMS):
        _do(builder, "tilezero", _register(c))
    return context.get_dummy_value()


@lower_builtin(add_sums, types.intp, types.Array, types.intp, types.Array, *_PLACE)
def _(context, builder, sig, args):
    n, a, at, b, b_at, b_step = args
    _, a_kind, _, b_kind, *_ = sig.args
    width = ir.Constant(at.type, _WIDTH)
    row = pointer(context, builder, a_kind, a, at, BYTE)
    _do(builder, "tileloadd64", _register(_A), row, width)
    for c in _below(builder, n):
        place = builder.add(b_at, builder.mul(b_step, ir.Constant(b_step.type, c)))
        column = pointer(context, builder, b_kind, b, place, BYTE)
        factor = _register(_A + 1 + c % 3)  # the three that are left take turns
        _do(builder, "tileloadd64", factor, column, width)
        _do(builder, "tdpbf16ps", _register(c), _register(_A), factor)
    return context.get_dummy_value()


@lower_builtin(store_sums, types.intp, types.Array, *_PLACE)
def _(context, builder, sig, args):
    n, out, at, step = args
    stride = builder.mul(step, ir.Constant(step.type, 4))
    for c in _below(builder, n):
        place = builder.add(at, ir.Constant(at.type, c * _SIDE))
        target = pointer(context, builder, sig.args[1], out, place, BYTE)
        _do(builder, "tilestored64", _register(c), target, stride)
    return context.get_dummy_value()


def _below(builder, n):
    """Each sum c < n, while code for it alone is made."""
    for c in range(SUMS):
        with builder.if_then(builder.icmp_signed("<", ir.Constant(n.type, c), n)):
            yield c


def multiply(builder, columns: int, adds: bool, products, out) -> None:
    """What a tile of `numba_tile` compiles to. products: (a, b, depth), Operands and whole
    sixteens.
    """
    size = out.step.type

    def stride(step):
        return builder.mul(step, ir.Constant(size, 4))

    sums = {
        _register(r * COLUMNS + c): out.at(r * _SIDE, BYTE, ir.Constant(size, c * _SIDE))
        for r in range(ROWS // _SIDE)
        for c in range(columns)
    }
    for register, target in sums.items():
        if adds:
            _do(builder, "tileloadd64", register, target, stride(out.step))
        else:
            _do(builder, "tilezero", register)
    zero, deep, width = (ir.Constant(size, n) for n in (0, _SIDE, _WIDTH))
    for a, b, depth in products:
        with cgutils.for_range_slice(builder, zero, depth, deep, size) as (k, _):
            shift = builder.mul(k, deep)
            for c in range(columns):
                _do(builder, "tileloadd64", _register(_B + c), b.at(c, BYTE, shift), width)
            for r in range(ROWS // _SIDE):
                row, factor = a.at(r * _SIDE, BYTE, k), _register(_A + r)
                _do(builder, "tileloadd64", factor, row, stride(a.step))
                for c in range(columns):
                    total = _register(r * COLUMNS + c)
                    _do(builder, "tdpbf16ps", total, factor, _register(_B + c))
    for register, target in sums.items():
        _do(builder, "tilestored64", register, target, stride(out.step))


def _register(n):
    return ir.Constant(BYTE, n)


def _do(builder, name, *arguments):
    call(builder, f"llvm.x86.{name}", ir.VoidType(), *arguments)
