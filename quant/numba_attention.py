"""Attention on CPUs with AVX-512 BF16, by the instruction that sums pairs of bfloat16 products.

torch's fused kernel multiplies bfloat16 there as slowly as float32. Here keys and values of a head
are packed once, as that instruction reads them; six queries at a time then meet all keys, the whole
rows of scores staying in cache, so that one plain softmax will do; and the probabilities, rounded
to bfloat16, meet the values. Queries, keys, values and probabilities are each rounded once, all
sums are in float32.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable
from torch import Tensor

from .numba_jit import FEATURES, ZERO, f4, jit
from .numba_vector import (
    FLOATS,
    INTS,
    LANES,
    LOWERED,
    WORD,
    biggest_lane,
    define,
    floats,
    helper,
    load,
    nearest,
    pointer,
    select,
    splat,
    store,
    transpose,
)
from .threads import in_threads

# With AMX torch has a faster one.
SUPPORTED = FEATURES.get("avx512bf16", False) and not FEATURES.get("amx-bf16", False)
ROWS, COLUMNS = 6, 4  # of a tile, in queries and vectors: 24 sums, of 32 registers
_STEP = COLUMNS * LANES  # keys, or numbers of a value, of a tile
_LOG2_E = 1.4426950408889634
_LEAST = f4(-126.0)  # exponent


class _BFloat(ir.Type):
    null, intrinsic_name = "0.0", "bf16"

    def _to_string(self):
        return "bfloat"


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def _call(builder, name, result, *arguments):
    kind, known = ir.FunctionType(result, [a.type for a in arguments]), builder.module.globals
    function = known[name] if name in known else ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def _rounded(builder, low, high):
    """<32 x bfloat>: two vectors of float32, one after the other."""
    return _call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, high, low)


def pack(low, high):
    """Thirty-two float32, rounded to bfloat16, in pairs of neighbours; passes for float32."""


def interleave(low, high):
    """Lane j: the pair of low's and high's number, rounded to bfloat16; passes for float32."""


def power_of_2(n):
    """2^n as float32, of int32 from -126 to 127."""


@define(pack, FLOATS, FLOATS, FLOATS)
def _(builder, low, high):
    return builder.bitcast(_rounded(builder, low, high), LOWERED[FLOATS])


@define(interleave, FLOATS, FLOATS, FLOATS)
def _(builder, low, high):
    both = _rounded(builder, low, high)
    lanes = [lane + side for lane in range(LANES) for side in (0, LANES)]
    mask = ir.Constant(ir.VectorType(WORD, 2 * LANES), lanes)
    return builder.bitcast(builder.shuffle_vector(both, both, mask), LOWERED[FLOATS])


@define(power_of_2, FLOATS, INTS)
def _(builder, n):
    bias, shift = (ir.Constant(LOWERED[INTS], [number] * LANES) for number in (127, 23))
    return builder.bitcast(builder.shl(builder.add(n, bias), shift), LOWERED[FLOATS])


def tile(a, a_at, a_step, b, b_at, b_step, pairs, out, out_at, out_step):
    """ROWS × COLUMNS vectors of sums over `pairs`: row r of a begins at a_at + r·a_step, a pair for
    each float32; column c of b at b_at + c·b_step, a vector of pairs for each. Row r of the result
    goes to out_at + r·out_step.
    """


@type_callable(tile)
def _(context):
    def typed(a, a_at, a_step, b, b_at, b_step, pairs, out, out_at, out_step):
        place = (types.intp, types.intp)
        return signature(types.none, a, *place, b, *place, types.intp, out, *place)

    return typed


@lower_builtin(tile, *(types.Array, types.intp, types.intp) * 2, types.intp,
               types.Array, types.intp, types.intp)  # fmt: skip
def _(context, builder, sig, args):
    a, a_at, a_step, b, b_at, b_step, pairs, out, out_at, out_step = args
    size, vector = a_at.type, LOWERED[FLOATS]
    at = lambda start, step, n: builder.add(start, builder.mul(step, ir.Constant(size, n)))  # noqa: E731
    place = lambda k, array, start, kind: pointer(  # noqa: E731
        context, builder, sig.args[k], array, start, kind
    )
    zero = ir.Constant(vector, [0.0] * LANES)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(COLUMNS)] for _ in range(ROWS)]
    with cgutils.for_range(builder, pairs, intp=size) as loop:
        columns = []
        for c in range(COLUMNS):
            start = builder.add(
                at(b_at, b_step, c), builder.mul(loop.index, ir.Constant(size, LANES))
            )
            loaded = builder.load(place(3, b, start, vector), align=4)
            columns.append(builder.bitcast(loaded, _PAIRS))
        for r in range(ROWS):
            start = builder.add(at(a_at, a_step, r), loop.index)
            pair = builder.load(place(0, a, start, WORD), align=4)
            row = ir.Constant(LOWERED[INTS], ir.Undefined)
            row = builder.insert_element(row, pair, ir.Constant(WORD, 0))
            lanes = ir.Constant(ir.VectorType(WORD, LANES), [0] * LANES)
            row = builder.bitcast(builder.shuffle_vector(row, row, lanes), _PAIRS)
            for c, column in enumerate(columns):
                name = "llvm.x86.avx512bf16.dpbf16ps.512"
                total = _call(builder, name, vector, builder.load(sums[r][c]), row, column)
                builder.store(total, sums[r][c])
    for r in range(ROWS):
        for c in range(COLUMNS):
            start = builder.add(at(out_at, out_step, r), ir.Constant(size, c * LANES))
            builder.store(builder.load(sums[r][c]), place(7, out, start, vector), align=4)
    return context.get_dummy_value()


@helper
def _power(t):
    """2^t of t ≤ 0, to 2e-7 of itself, not below 2^-126; NaN stays NaN."""
    t = select(t < _LEAST, _LEAST, t)
    n = nearest(t)
    f = t - floats(n)
    v = f * f4(1.8775767e-3) + f4(8.9893397e-3)  # minimax of 2^f on -1/2 … 1/2 (Cephes, exp2f)
    v = v * f + f4(5.5826318e-2)
    v = v * f + f4(2.4015361e-1)
    v = v * f + f4(6.9315308e-1)
    v = v * f + f4(9.9999994e-1)
    return v * power_of_2(n)


@helper
def _softmax(s, at, keys, padded, factor, p, to):
    """p[to :] = exp(factor·(s - most)) in pairs of bfloat16, factor to base 2. -> their sum."""
    for i in range(keys, padded):
        s[at + i] = -np.inf
    largest = splat(f4(-np.inf))
    for i in range(at, at + padded, LANES):
        v = load(s, i)
        largest = select(v > largest, v, largest)
    most = splat(biggest_lane(largest) * factor)
    total = splat(ZERO)
    for i in range(0, padded, 2 * LANES):
        low = _power(load(s, at + i) * factor - most)
        high = _power(load(s, at + i + LANES) * factor - most)
        total += low + high
        store(p, to + i // 2, pack(low, high))
    return total


@helper
def _sum(v, lanes):
    store(lanes, 0, v)
    total = ZERO
    for lane in lanes:
        total += lane
    return total


@helper
def _pack_keys(k, at, step, keys, padded, width, row, panel):
    """panel: for each sixteen keys, each pair of a key's numbers, a vector of those keys."""
    pairs = width // 2
    for key in range(0, padded, LANES):
        for j in range(LANES):
            for i in range(0, pairs, LANES):
                v = splat(ZERO)
                if key + j < keys:
                    start = at + (key + j) * step + 2 * i
                    v = pack(load(k, start), load(k, start + LANES))
                store(row, j * pairs + i, v)
        for i in range(0, pairs, LANES):
            transpose(row, i, pairs, panel, (key * pairs) + i * LANES)


@helper
def _pack_values(v, at, step, keys, padded, width, panel):
    """panel: for each sixteen numbers of a value, each pair of keys, a vector of those numbers."""
    for i in range(0, width, LANES):
        for key in range(0, padded, 2):
            low = high = splat(ZERO)
            if key < keys:
                low = load(v, at + key * step + i)
            if key + 1 < keys:
                high = load(v, at + (key + 1) * step + i)
            store(panel, (i * padded + key * LANES) // 2, interleave(low, high))


@jit
def _attend(q, k, v, out, first, end, heads, rows, keys, width, scale):
    """Heads first … end of all pictures' heads; arrays (pictures, tokens, heads, width), flat."""
    padded, pairs, step = -(-keys // _STEP) * _STEP, width // 2, heads * width
    key_panel, row = np.empty(padded * pairs, np.float32), np.empty(LANES * pairs, np.float32)
    value_panel = np.empty(padded * pairs, np.float32)
    a, s = np.zeros(ROWS * pairs, np.float32), np.empty(ROWS * padded, np.float32)
    p, o = np.zeros(ROWS * padded // 2, np.float32), np.empty(ROWS * width, np.float32)
    share, lanes = np.empty(ROWS, np.float32), np.empty(LANES, np.float32)
    factor = f4(scale * _LOG2_E)
    for head in range(first, end):
        at = (head // heads * keys * heads + head % heads) * width
        _pack_keys(k, at, step, keys, padded, width, row, key_panel)
        _pack_values(v, at, step, keys, padded, width, value_panel)
        at = (head // heads * rows * heads + head % heads) * width
        for start in range(0, rows, ROWS):
            n = min(ROWS, rows - start)
            for r in range(n):
                for i in range(0, pairs, LANES):
                    place = at + (start + r) * step + 2 * i
                    store(a, r * pairs + i, pack(load(q, place), load(q, place + LANES)))
            for key in range(0, padded, _STEP):
                tile(a, 0, pairs, key_panel, key * pairs, LANES * pairs, pairs, s, key, padded)
            for r in range(n):
                total = _softmax(s, r * padded, keys, padded, factor, p, r * padded // 2)
                share[r] = f4(1.0) / _sum(total, lanes)
            half = padded // 2
            for i in range(0, width, _STEP):
                tile(p, 0, half, value_panel, i * half, LANES * half, half, o, i, width)
            for r in range(n):
                for i in range(0, width, LANES):
                    place = at + (start + r) * step + i
                    store(out, place, load(o, r * width + i) * share[r])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (pictures, tokens, heads, width) to k and v (pictures, keys, heads, width),
    float32 on a CPU, contiguous -> like q. `width` is a multiple of 64.
    """
    pictures, rows, heads, width = q.shape
    out, keys = torch.empty_like(q), k.shape[1]
    arrays = [t.detach().view(-1).numpy() for t in (q, k, v, out)]

    def work(first: int, end: int) -> None:
        _attend(*arrays, first, end, heads, rows, keys, width, width**-0.5)

    in_threads(work, pictures * heads, rows * keys)
    return out
