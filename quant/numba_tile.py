"""Products of bfloat16 matrices in registers, by the instruction of AVX-512 BF16 that sums pairs.

One factor is read row by row, a pair of neighbours at a time, spread over a vector; of the other a
vector holds a pair of each of sixteen columns. Pairs of bfloat16 pass for a float32. All sums are
in float32.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable

from .numba_jit import FEATURES, ZERO
from .numba_vector import (
    FLOATS,
    INTS,
    LANES,
    LOWERED,
    WORD,
    define,
    helper,
    load,
    pointer,
    splat,
    store,
    transpose,
)

# With AMX torch is faster.
SUPPORTED = FEATURES.get("avx512bf16", False) and not FEATURES.get("amx-bf16", False)
ROWS, COLUMNS = 6, 4  # of a tile, in queries and vectors: 24 sums, of 32 registers


class _BFloat(ir.Type):
    null, intrinsic_name = "0.0", "bf16"

    def _to_string(self):
        return "bfloat"


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
_SUM_OF_PAIRS = "llvm.x86.avx512bf16.dpbf16ps.512"


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


@define(pack, FLOATS, FLOATS, FLOATS)
def _(builder, low, high):
    return builder.bitcast(_rounded(builder, low, high), LOWERED[FLOATS])


@define(interleave, FLOATS, FLOATS, FLOATS)
def _(builder, low, high):
    both = _rounded(builder, low, high)
    lanes = [lane + side for lane in range(LANES) for side in (0, LANES)]
    mask = ir.Constant(ir.VectorType(WORD, 2 * LANES), lanes)
    return builder.bitcast(builder.shuffle_vector(both, both, mask), LOWERED[FLOATS])


def make_tile(columns: int, adds: bool = False) -> Callable:
    """A function for kernels, whose registers hold ROWS rows of so many vectors (up to COLUMNS)."""

    def tile(a, a_at, a_step, b, b_at, b_step, pairs, out, out_at, out_step):
        """ROWS × columns vectors of sums over `pairs`, put into `out` or added to it. Row r of a
        begins at a_at + r·a_step, a pair for each float32; column c of b at b_at + c·b_step, a
        vector of pairs for each; row r of the result at out_at + r·out_step.
        """

    place = (types.intp, types.intp)

    @type_callable(tile)
    def _(context):
        def typed(a, a_at, a_step, b, b_at, b_step, pairs, out, out_at, out_step):
            return signature(types.none, a, *place, b, *place, types.intp, out, *place)

        return typed

    array = (types.Array, *place)

    @lower_builtin(tile, *array, *array, types.intp, *array)
    def _(context, builder, sig, args):
        a, a_at, a_step, b, b_at, b_step, pairs, out, out_at, out_step = args
        size, vector = a_at.type, LOWERED[FLOATS]

        def at(start, step, n):
            return builder.add(start, builder.mul(step, ir.Constant(size, n)))

        def reach(argument, array, start, kind):
            return pointer(context, builder, sig.args[argument], array, start, kind)

        targets = {
            (r, c): reach(7, out, at(at(out_at, out_step, r), ir.Constant(size, LANES), c), vector)
            for r in range(ROWS)
            for c in range(columns)
        }
        zero = ir.Constant(vector, [0.0] * LANES)
        sums = {
            key: cgutils.alloca_once_value(builder, builder.load(t, align=4) if adds else zero)
            for key, t in targets.items()
        }
        with cgutils.for_range(builder, pairs, intp=size) as loop:
            shift = builder.mul(loop.index, ir.Constant(size, LANES))
            vectors = []
            for c in range(columns):
                start = builder.add(at(b_at, b_step, c), shift)
                loaded = builder.load(reach(3, b, start, vector), align=4)
                vectors.append(builder.bitcast(loaded, _PAIRS))
            for r in range(ROWS):
                start = builder.add(at(a_at, a_step, r), loop.index)
                row = _spread(builder, builder.load(reach(0, a, start, WORD), align=4))
                for c, column in enumerate(vectors):
                    total = builder.load(sums[r, c])
                    total = _call(builder, _SUM_OF_PAIRS, vector, total, row, column)
                    builder.store(total, sums[r, c])
        for key, target in targets.items():
            builder.store(builder.load(sums[key]), target, align=4)
        return context.get_dummy_value()

    return tile


def _spread(builder, pair):
    row = ir.Constant(LOWERED[INTS], ir.Undefined)
    row = builder.insert_element(row, pair, ir.Constant(WORD, 0))
    lanes = ir.Constant(ir.VectorType(WORD, LANES), [0] * LANES)
    return builder.bitcast(builder.shuffle_vector(row, row, lanes), _PAIRS)


@helper
def pack_rows(x, at, step, rows, first, end, width, row, panel):
    """panel: for each sixteen of x's rows from `first` to `end`, each pair of a row's `width`
    numbers, a vector of those rows; beyond `rows` zeros. Row j of x begins at `at` + j·step; `row`
    is room for LANES · width / 2 numbers.
    """
    pairs = width // 2
    for start in range(first, end, LANES):
        for j in range(LANES):
            for i in range(0, pairs, LANES):
                v = splat(ZERO)
                if start + j < rows:
                    place = at + (start + j) * step + 2 * i
                    v = pack(load(x, place), load(x, place + LANES))
                store(row, j * pairs + i, v)
        for i in range(0, pairs, LANES):
            transpose(row, i, pairs, panel, start * pairs + i * LANES)
