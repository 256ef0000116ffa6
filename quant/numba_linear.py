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
from .numba_jit import ZERO, jit
from .numba_memory import aligned, load, transpose
from .numba_native import bytes_at, floats_at, in_parts, ints_at, reader_of, shorts_at
from .numba_tile import DTYPE, NUMBERS, ROWS, add_all, hold, pack_rows, pack_times, release
from .numba_vector import LANES, helper
from .types import PLAIN_QTYPES

LowRank = tuple[Tensor, Tensor]

UNPACKED = PLAIN_QTYPES[DTYPE]  # of a matrix as it is multiplied
_KIND = torch.uint16 if NUMBERS == 2 else torch.float32  # of an unpacked tile, see `put`
_SLICE, _MOST = lcm(ROWS, LANES), 192  # rows: so many of a tile, at the least and the most
_LARGEST = 2**19 * NUMBERS  # weights of a tile: 2 MiB
_SUMMED = 512  # vectors whose sums with a tile are kept at a time
_DEPTH = 128  # numbers or pairs that meet before the next vectors do: 8 KiB of each LANES
_PACKED = 4  # LANES of vectors that a thread packs at a time
_NONE = np.empty(0, np.int64)


class _Told(NamedTuple):
    """What the threads are told, see `linear`; names of tensors are addresses, 0 for none."""

    x: int
    blocks: int
    bias: int
    up: int
    down: int
    out: int
    panel: int  # the packed vectors
    low_panel: int  # … times `down`, and packed
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
def _panels(t):
    """Of the vectors, and of what they are of low rank."""
    size = t.padded * (t.rank // NUMBERS)
    return floats_at(t.panel, t.padded * t.depth), floats_at(t.low_panel, size)


@jit
def _pack_vectors(told, first, end):
    """Fills the panels for sixteens of vectors; these times `down` while they are in the cache."""
    t, first, end = _told(told), first * LANES, end * LANES
    (panel, low_panel), x = _panels(t), floats_at(t.x, t.vectors * t.columns)
    down = floats_at(t.down, t.rank * t.depth)
    rows, low = aligned(_SLICE * t.depth), aligned(_SLICE * t.rank)
    row, held = aligned(LANES * t.rank // NUMBERS), hold()
    for start in range(first, end, _SLICE):
        upto = min(start + _SLICE, end)
        if t.rank:
            pack_times(
                x, t.columns, t.vectors, start, upto, t.columns, rows, panel, down, t.rank, low
            )
            at = -start * t.rank
            pack_rows(low, at, t.rank, t.vectors, start, upto, t.rank, row, low_panel)
        else:
            pack_rows(x, 0, t.columns, t.vectors, start, upto, t.columns, rows, panel)
    release(held)


@helper
def _unpack(t, row, rows, a, step):
    """a (rows, step): some rows of the matrix."""
    for r in range(rows):
        data, to = t.blocks + (row + r) * t.row_size, r * step
        if t.unpack:
            at = a.ctypes.data + 4 * to
            weights = shorts_at(at, 2 * t.depth) if NUMBERS == 2 else floats_at(at, t.depth)
            unpack_by(t.unpack, t.grid, t.codes, bytes_at(data, t.row_size), weights)
        else:
            a[to : to + t.depth] = floats_at(data, t.depth)


@helper
def _multiply_tile(t, row, rows, out):
    """Unpacks some rows and multiplies them with all vectors: out (vectors, t.rows), as `put` takes
    it, from column `row` on. What is of low rank meets sums that are in registers already.
    """
    (panel, low_panel), width = _panels(t), t.rank // NUMBERS
    up = floats_at(t.up, (t.rows + ROWS) * width)
    bias = floats_at(t.bias, t.rows) if t.bias else np.zeros(t.rows, np.float32)
    padded, across = -(-rows // ROWS) * ROWS, min(t.padded, _SUMMED) + LANES
    sums, turned = aligned(padded * across), aligned(padded * LANES)
    if t.unpack or rows < padded:
        step = t.depth + LANES  # rows a power of two apart would share a place in the cache
        a = aligned(padded * step)
        _unpack(t, row, rows, a, step)
    else:
        step, a = t.depth, floats_at(t.blocks + row * t.row_size, rows * t.depth)
    held = hold()
    for first in range(0, t.vectors, _SUMMED):
        end = min(first + _SUMMED, t.vectors)
        sums[:] = ZERO
        for k in range(0, t.depth, _DEPTH):
            depth = min(_DEPTH, t.depth - k)
            deep = width if k + depth == t.depth else 0
            add_all(
                a, k, step, rows, panel, first * t.depth + k * LANES, t.depth, end - first, depth,
                up, row * width, low_panel, first * width, width, deep, sums, across,
            )  # fmt: skip
        for v in range(first, end, LANES):
            for r in range(0, rows, LANES):
                transpose(sums, r * across + v - first, across, turned, r * LANES)
            for i in range(min(LANES, end - v)):
                place = (v + i) * t.rows + row
                for r in range(0, rows, LANES):
                    put(out, place + r, load(turned, (r + i) * LANES) + load(bias, row + r))
    release(held)


@jit
def _multiply_rows(told, first, end):
    t = _told(told)
    if t.streamed:
        _multiply_tile(t, first, end - first, ints_at(t.out, t.vectors * t.rows))
    else:
        _multiply_tile(t, first, end - first, floats_at(t.out, t.vectors * t.rows))


def low_rank(up: Tensor, down: Tensor) -> LowRank:
    """up (rows, rank) and down (rank, columns), as the kernel reads them: of its type, the rank
    filled up with zeros to vectors of numbers or pairs; up with ROWS rows more than are there, down
    as a panel, see `pack_rows`.
    """
    more = -up.shape[1] % (LANES * NUMBERS)
    up, down = pad(up.to(DTYPE), (0, more, 0, ROWS)), pad(down.to(DTYPE), (0, 0, 0, more))
    panel = down.view(-1, LANES, down.shape[1] // NUMBERS, NUMBERS).transpose(1, 2)
    return up.contiguous(), panel.contiguous()


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
    panel, low_panel = (_room(padded * n) for n in (depth, rank // NUMBERS))
    unpack, grid = (0, _NONE) if qtype == UNPACKED else native_kernel(qtype, _KIND)
    share, groups = -(-rows // threads), padded // LANES
    most = min(_MOST, _LARGEST // columns, share + _SLICE - 1)
    some_rows = max(_SLICE, most // _SLICE * _SLICE)
    some_groups = max(1, min(_PACKED, groups // threads))
    told = _Told(
        *(0 if t is None else t.data_ptr() for t in (x, blocks, bias, up, down, out)),
        *(t.data_ptr() for t in (panel, low_panel)),
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
