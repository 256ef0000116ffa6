"""Products of matrices in registers: of bfloat16, by AMX or the instruction of AVX-512 BF16 that
sums pairs; on CPUs that have no more than AVX2 of float32, by fused multiplication and addition.

One factor is read row by row, a number at a time, spread over a vector; of the other a vector holds
a number of each of sixteen columns. For bfloat16 a pair of neighbours takes a number's place. AMX
reads both as they lie for that (`numba_amx.py`). All sums are in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable

from . import numba_amx as amx
from .numba_jit import AMX, FEATURES, ZERO
from .numba_memory import aligned, load, pointer, store, transpose
from .numba_vector import (
    FLOATS,
    LANES,
    LOWERED,
    WORD,
    BFloat,
    call,
    define,
    helper,
    shuffle,
    splat,
    spread,
)

# With AMX that we may not use torch is faster; with AVX-512 alone its float32 is not measured.
PAIRS = FEATURES.get("avx512bf16", False) and FEATURES.get("amx-bf16", False) == AMX
_TILES = PAIRS and AMX
_SINGLES = all(FEATURES.get(name, False) for name in ("avx2", "fma"))
SUPPORTED = PAIRS or (_SINGLES and not FEATURES.get("avx512f", False))
DTYPE, NUMBERS = (torch.bfloat16, 2) if PAIRS else (torch.float32, 1)  # in the place of a float32
# Of a tile, in rows and vectors: AMX's; 24 sums of 32 registers; or 6 of two registers each, of 16.
ROWS, COLUMNS = (amx.ROWS, amx.COLUMNS) if _TILES else (6, 4 if PAIRS else 1)


_PAIRS = ir.VectorType(BFloat(), 2 * LANES)
_SUM_OF_PAIRS = "llvm.x86.avx512bf16.dpbf16ps.512"


def _rounded(builder, low, high):
    """<32 x bfloat>: two vectors of float32, one after the other."""
    return call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, high, low)


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
    return builder.bitcast(shuffle(builder, both, both, lanes), LOWERED[FLOATS])


_PLACE = (types.intp, types.intp)
_ARRAY = (types.Array, *_PLACE)
_FACTORS = (*_ARRAY, *_ARRAY, types.intp)


class Operand(NamedTuple):
    """A matrix as a tile is given it: `reach` makes a pointer of an index and a type; the index
    where it begins; the step from one of its rows (or columns) to the next.
    """

    builder: ir.IRBuilder
    reach: Callable
    first: ir.Value
    step: ir.Value

    def at(self, n: int, kind: ir.Type, more: ir.Value):
        """A pointer to `kind`, `more` numbers from the beginning of row n."""
        start = self.builder.mul(self.step, ir.Constant(self.step.type, n))
        return self.reach(self.builder.add(self.builder.add(self.first, start), more), kind)


def make_tile(columns: int) -> Callable:
    """A function for kernels, whose registers hold ROWS rows of so many vectors (up to COLUMNS)."""

    def tile(a, a_at, a_step, b, b_at, b_step, depth, out, out_at, out_step):
        """ROWS × columns vectors of sums over `depth` numbers or pairs, put into `out`. Row r of a
        begins at a_at + r·a_step; column c of b at b_at + c·b_step, a vector for each of a's; row r
        of the result at out_at + r·out_step.
        """

    @type_callable(tile)
    def _(context):
        def typed(a, a_at, a_step, b, b_at, b_step, depth, out, out_at, out_step):
            return signature(types.none, a, *_PLACE, b, *_PLACE, types.intp, out, *_PLACE)

        return typed

    @lower_builtin(tile, *_FACTORS, *_ARRAY)
    def _(context, builder, sig, args):
        _emit(builder, columns, False, *_operands(context, builder, sig.args, args))
        return context.get_dummy_value()

    return tile


def add_tile(
    columns, a, a_at, a_step, b, b_at, b_step, depth, c, c_at, c_step, d, d_at, d_step, deep,
    out, out_at, out_step,
):  # fmt: skip
    """As a tile of so many columns, 1 to COLUMNS, but added to `out`; and of c and d another, over
    `deep`, while the sums are in registers.
    """


@type_callable(add_tile)
def _(context):
    def typed(
        columns, a, a_at, a_step, b, b_at, b_step, depth, c, c_at, c_step, d, d_at, d_step, deep,
        out, out_at, out_step,
    ):  # fmt: skip
        first = (a, *_PLACE, b, *_PLACE, types.intp)
        second = (c, *_PLACE, d, *_PLACE, types.intp)
        return signature(types.none, types.intp, *first, *second, out, *_PLACE)

    return typed


def _operands(context, builder, kinds, args):
    """[(a, b, depth), …], out"""

    def operand(n):
        reach = partial(pointer, context, builder, kinds[n], args[n])
        return Operand(builder, reach, *args[n + 1 : n + 3])

    out = len(args) - len(_ARRAY)
    products = range(0, out, len(_FACTORS))
    return [(operand(n), operand(n + 3), args[n + 6]) for n in products], operand(out)


@lower_builtin(add_tile, types.intp, *_FACTORS, *_FACTORS, *_ARRAY)
def _(context, builder, sig, args):
    columns, *args = args
    products, out = _operands(context, builder, sig.args[1:], args)
    for n in range(1, COLUMNS + 1):
        with builder.if_then(builder.icmp_signed("==", columns, ir.Constant(columns.type, n))):
            _emit(builder, n, True, products, out)
    return context.get_dummy_value()


def _multiply(builder, columns, adds, products, out):
    """What a tile compiles to, in vectors."""
    size, vector = out.step.type, LOWERED[FLOATS]
    targets = {
        (r, c): out.at(r, vector, ir.Constant(size, c * LANES))
        for r in range(ROWS)
        for c in range(columns)
    }
    zero = ir.Constant(vector, [0.0] * LANES)
    sums = {
        key: cgutils.alloca_once_value(builder, builder.load(t, align=4) if adds else zero)
        for key, t in targets.items()
    }
    for a, b, depth in products:
        with cgutils.for_range(builder, depth, intp=size) as loop:
            shift = builder.mul(loop.index, ir.Constant(size, LANES))
            vectors = [builder.load(b.at(c, vector, shift), align=4) for c in range(columns)]
            for r in range(ROWS):
                word = builder.load(a.at(r, WORD, loop.index), align=4)
                row = builder.bitcast(spread(builder, word), vector)
                for c, column in enumerate(vectors):
                    total = _added(builder, builder.load(sums[r, c]), row, column)
                    builder.store(total, sums[r, c])
    for key, target in targets.items():
        builder.store(builder.load(sums[key]), target, align=4)


_emit = amx.multiply if _TILES else _multiply


def _added(builder, total, row, column):
    """total + row · column, each lane for itself."""
    if PAIRS:
        row, column = (builder.bitcast(factor, _PAIRS) for factor in (row, column))
        return call(builder, _SUM_OF_PAIRS, LOWERED[FLOATS], total, row, column)
    return call(builder, f"llvm.fma.v{LANES}f32", LOWERED[FLOATS], row, column, total)


@helper
def _paired(x, at):
    return pack(load(x, at), load(x, at + LANES))


_taken = _paired if PAIRS else load


@helper
def pack_rows(x, at, step, rows, first, end, width, row, panel):
    """panel: for each sixteen of x's rows from `first` to `end`, each number (or pair) of a row's
    `width`, a vector of those rows; beyond `rows` zeros. Row j of x begins at `at` + j·step; `row`
    is room for LANES · width / NUMBERS numbers.
    """
    depth = width // NUMBERS
    for start in range(first, end, LANES):
        for j in range(LANES):
            for i in range(0, depth, LANES):
                v = splat(ZERO)
                if start + j < rows:
                    v = _taken(x, at + (start + j) * step + NUMBERS * i)
                store(row, j * depth + i, v)
        for i in range(0, depth, LANES):
            transpose(row, i, depth, panel, start * depth + i * LANES)


@helper
def add_all(
    a, at, step, rows, b, from_b, b_step, vectors, depth,
    up, from_up, low, from_low, width, deep, sums, across,
):  # fmt: skip
    """sums (rows, across) += a · b of `depth`, and += up (rows, width) · low (width, vectors) of
    depth 0 to `deep`. A row of a is `step` long, a vector of b `b_step`; for the panels b and low
    see `pack_rows`; a, up and sums are read by whole ROWS.
    """
    for place in range(0, vectors, COLUMNS * LANES):
        columns = min(COLUMNS, -(-(vectors - place) // LANES))
        for r in range(0, rows, ROWS):
            add_tile(
                columns, a, at + r * step, step,
                b, from_b + place * b_step, b_step * LANES, depth,
                up, from_up + r * width, width, low, from_low + place * width, width * LANES, deep,
                sums, r * across + place, across,
            )  # fmt: skip


@helper
def _pack_times(x, step, rows, first, end, width, room, panel, b, rank, out):
    """As `pack_rows` from x[0] on, and out (end - first, rank) = those rows · b, a panel of `width`
    numbers of `rank` columns, a multiple of LANES. `room` is for the rows, and like out for whole
    ROWS; what is there beyond `end` is lost.
    """
    depth, none = width // NUMBERS, aligned(0)
    for start in range(first, end, LANES):
        row = room[(start - first) * depth :]
        pack_rows(x, 0, step, rows, start, start + LANES, width, row, panel)
    out[:] = ZERO
    add_all(
        room, 0, depth, end - first, b, 0, depth, rank, depth,
        none, 0, none, 0, 0, 0, out, rank,
    )  # fmt: skip


@helper
def _pack_times_amx(x, step, rows, first, end, width, room, panel, b, rank, out):
    """The same in AMX, whose registers multiply while vectors are packed and memory is waited
    for. Of more columns than they have sums for, the rows are rounded again, not packed.
    """
    depth, places = width // NUMBERS, 4 * LANES  # of `room`, which stays in the first cache
    for start in range(first, end, LANES):
        for column in range(0, rank, amx.SUMS * LANES):
            n, from_b = min(amx.SUMS, (rank - column) // LANES), column * depth
            amx.zero_sums()
            for i in range(0, depth + LANES, LANES):
                if i < depth:
                    at = i % places * LANES
                    for j in range(LANES):
                        v = splat(ZERO)
                        if start + j < rows:
                            v = _taken(x, (start + j) * step + NUMBERS * i)
                        store(room, at + j * LANES, v)
                    if column == 0:
                        transpose(room, at, LANES, panel, start * depth + i * LANES)
                if i:  # what was stored before, lest the registers wait for it
                    k = i - LANES
                    amx.add_sums(n, room, k % places * LANES, b, from_b + k * LANES, depth * LANES)
            amx.store_sums(n, out, (start - first) * rank + column, rank)


@helper
def _nothing():
    return 0


@helper
def _forget(kept):
    pass


# Before and after the tiles of a kernel: release(hold()).
hold, release = (amx.hold, amx.release) if _TILES else (_nothing, _forget)
pack_times = _pack_times_amx if _TILES else _pack_times
