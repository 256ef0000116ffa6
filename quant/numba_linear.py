"""A quantised matrix times many vectors on CPUs, without writing the matrix out.

Vectors are packed once as `numba_tile.py` reads them, on CPUs with AVX-512 BF16 rounded to
bfloat16. Each thread then unpacks a tile of rows to that type, which stays in its cache while all
the vectors meet it. So neither the unpacked matrix nor the vectors' and the results' roundings pass
through memory; sums, bias and results are float32.
"""

from math import lcm
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor
from torch.nn.functional import pad

from .numba_bytes import put
from .numba_dequant import native_kernel, streams, unpack_by
from .numba_jit import jit
from .numba_memory import aligned, load, transpose
from .numba_native import bytes_at, floats_at, in_parts, ints_at, reader_of, shorts_at
from .numba_tile import COLUMNS, DTYPE, NUMBERS, ROWS, add_tile, hold, pack_rows, release
from .numba_vector import LANES, helper
from .types import PLAIN_QTYPES

LowRank = tuple[Tensor, Tensor]

UNPACKED = PLAIN_QTYPES[DTYPE]  # of a matrix as it is multiplied
_KIND = torch.uint16 if NUMBERS == 2 else torch.float32  # of an unpacked tile, see `put`
_STEP = 4 * LANES  # vectors that meet a tile at once
_SLICE, _MOST = lcm(ROWS, LANES), 384  # rows: so many of a tile, at the least and the most
_LARGEST = 2**19 * NUMBERS  # weights of a tile: 2 MiB
_NONE = np.empty(0, np.int64)
_DEPTH = 768  # numbers or pairs that meet before the next rows do: 192 KiB of _STEP vectors


class _Told(NamedTuple):
    """What the threads are told, see `linear`; names of tensors are addresses, 0 for none."""

    x: int
    blocks: int
    bias: int
    up: int
    down: int
    out: int
    panel: int  # the packed vectors
    low: int  # the vectors times `down`, and these packed
    low_panel: int
    vectors: int
    padded: int  # … to whole LANES
    columns: int
    depth: int  # columns, or pairs of them
    rows: int
    row_size: int  # in bytes
    rank: int
    unpack: int  # code for `unpack_by`, 0 if the matrix is UNPACKED
    grid: int  # the codebook
    codes: int  # rows of that
    streamed: int  # whether `out` is to be written past the cache


_told = reader_of(_Told)


@helper
def _add_all(
    a, rows, b, b_at, vectors, step, first, end, up, up_at, low, low_at, width, deep, sums
):
    """sums (rows, _STEP) += a (rows, step) · b (step, vectors), of depth `first` to `end`, and
    += up (rows, width) · low (width, vectors) of depth 0 to `deep`.
    """
    for place in range(0, vectors, COLUMNS * LANES):
        columns = min(COLUMNS, -(-(vectors - place) // LANES))
        from_b, from_low = b_at + place * step + first * LANES, low_at + place * width
        for r in range(0, rows, ROWS):
            at, from_up, to = r * step + first, up_at + r * width, r * _STEP + place
            add_tile(
                columns, a, at, step, b, from_b, LANES * step, end - first,
                up, from_up, width, low, from_low, LANES * width, deep, sums, to, _STEP,
            )  # fmt: skip


@jit
def _multiply(a, rows, panel, depth, up, low_panel, low_depth, first, end, bias, out, row, step):
    """out (vectors, step), from column `row` on, for vectors first … end = these times the rows of
    a, plus theirs of low rank times rows `row` … of up, plus bias.

    a and up are read by whole ROWS; for the panels see `pack_rows`; out: as `put` takes it. What is
    of low rank meets sums that are in registers already.
    """
    sums, turned = aligned(_MOST * _STEP), aligned(_MOST * LANES)
    held = hold()
    for vector in range(first, end, _STEP):
        sums[: -(-rows // ROWS) * ROWS * _STEP] = np.float32(0)
        vectors = min(_STEP, end - vector)
        for k in range(0, depth, _DEPTH):
            upto = min(k + _DEPTH, depth)
            deep = low_depth if upto == depth else 0
            _add_all(
                a, rows, panel, vector * depth, vectors, depth, k, upto,
                up, row * low_depth, low_panel, vector * low_depth, low_depth, deep, sums,
            )  # fmt: skip
        for c in range(0, vectors, LANES):
            for r in range(0, rows, LANES):
                transpose(sums, r * _STEP + c, _STEP, turned, r * LANES)
            for i in range(min(LANES, vectors - c)):
                place = (vector + c + i) * step + row
                for r in range(0, rows, LANES):
                    put(out, place + r, load(turned, (r + i) * LANES) + load(bias, row + r))
    release(held)


@helper
def _panels(t):
    """Of the vectors, and of what they are of low rank."""
    size = t.padded * (t.rank // NUMBERS)
    return floats_at(t.panel, t.padded * t.depth), floats_at(t.low_panel, size)


@jit
def _pack_vectors(told, first, end):
    """Fills the panels for sixteens of vectors."""
    t, first, end = _told(told), first * LANES, end * LANES
    (panel, low_panel), x = _panels(t), floats_at(t.x, t.vectors * t.columns)
    down, low = floats_at(t.down, (t.rank + ROWS) * t.depth), floats_at(t.low, t.padded * t.rank)
    row, none = aligned(LANES * max(t.columns, t.rank) // NUMBERS), aligned(0)
    pack_rows(x, 0, t.columns, t.vectors, first, end, t.columns, row, panel)
    if t.rank:
        bias, last = np.zeros(t.rank, np.float32), min(end, t.vectors)
        for r in range(0, t.rank, _MOST):
            a, rows = down[r * t.depth :], min(_MOST, t.rank - r)
            _multiply(a, rows, panel, t.depth, none, none, 0, first, last, bias, low, r, t.rank)
        pack_rows(low, 0, t.rank, t.vectors, first, end, t.rank, row, low_panel)


@helper
def _multiply_tile(t, row, rows, out):
    """Unpacks and multiplies some rows."""
    (panel, low_panel), width = _panels(t), t.rank // NUMBERS
    up, a = floats_at(t.up, (t.rows + ROWS) * width), aligned(-(-rows // ROWS) * ROWS * t.depth)
    bias = floats_at(t.bias, t.rows) if t.bias else np.zeros(t.rows, np.float32)
    data, numbers = t.blocks + row * t.row_size, rows * t.depth
    if t.unpack:
        part, weights = bytes_at(data, rows * t.row_size), a.ctypes.data
        tile = shorts_at(weights, 2 * numbers) if NUMBERS == 2 else floats_at(weights, numbers)
        unpack_by(t.unpack, t.grid, t.codes, part, tile)
    elif rows % ROWS:
        a[:numbers] = floats_at(data, numbers)
    else:
        a = floats_at(data, numbers)
    _multiply(a, rows, panel, t.depth, up, low_panel, width, 0, t.vectors, bias, out, row, t.rows)


@jit
def _multiply_rows(told, first, end):
    t = _told(told)
    if t.streamed:
        _multiply_tile(t, first, end - first, ints_at(t.out, t.vectors * t.rows))
    else:
        _multiply_tile(t, first, end - first, floats_at(t.out, t.vectors * t.rows))


def low_rank(up: Tensor, down: Tensor) -> LowRank:
    """up (rows, rank) and down (rank, columns), as the kernel reads them: of its type, the rank
    filled up with zeros to vectors of numbers or pairs, and ROWS rows more than are there.
    """
    more = -up.shape[1] % (LANES * NUMBERS)
    up = pad(up.to(DTYPE), (0, more, 0, ROWS))
    return up.contiguous(), pad(down.to(DTYPE), (0, 0, 0, more + ROWS)).contiguous()


def linear(
    blocks: Tensor, qtype: T, x: Tensor, bias: Tensor | None, factors: LowRank | None = None
) -> Tensor:
    """x (vectors, columns) float32 times the transpose of a matrix, plus bias -> (vectors, rows)
    float32. Whole 32 columns, whole 16 rows. `factors`: see `low_rank`; their product is added to
    the matrix.

    blocks: (rows, bytes of a row) uint8 of UNPACKED or a type in `numba_dequant.COMPILED`, on the
    CPU.
    """
    (vectors, columns), (rows, row_size), threads = x.shape, blocks.shape, torch.get_num_threads()
    padded, depth = -(-vectors // LANES) * LANES, columns // NUMBERS
    up, down = factors or (None, None)
    rank = 0 if factors is None else up.shape[1]
    x, blocks, out = x.contiguous(), blocks.contiguous(), _room(vectors, rows)
    bias = None if bias is None else bias.detach().float().contiguous()
    panel, low, low_panel = (_room(padded * n) for n in (depth, rank, rank // NUMBERS))
    unpack, grid = (0, _NONE) if qtype == UNPACKED else native_kernel(qtype, _KIND)
    share, groups = -(-rows // threads), padded // LANES
    most = min(_MOST, _LARGEST // columns, share + _SLICE - 1)
    some_rows = max(_SLICE, most // _SLICE * _SLICE)
    some_groups = max(1, min(_STEP // LANES, groups // threads))
    told = _Told(
        *(0 if t is None else t.data_ptr() for t in (x, blocks, bias, up, down, out)),
        *(t.data_ptr() for t in (panel, low, low_panel)),
        vectors=vectors,
        padded=padded,
        columns=columns,
        depth=depth,
        rows=rows,
        row_size=row_size,
        rank=rank,
        unpack=unpack,
        grid=grid.ctypes.data,
        codes=len(grid),
        streamed=streams(out),
    )
    in_parts(_pack_vectors, told, groups, some_groups, LANES * columns)
    in_parts(_multiply_rows, told, rows, some_rows, columns)
    return out


def _room(*shape: int) -> Tensor:
    """Of float32, beginning with a line of the cache."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
