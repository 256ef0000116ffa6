"""A quantised matrix times a few vectors on CPUs, without ever writing the matrix out.

With few vectors a product costs less than moving the unpacked weights to memory and back. Here a
tile of rows is unpacked by `numba_blocks.py` and multiplied while it is in cache, all in float32. A
sum runs in 64 lanes, whatever the machine, so results do not depend on it.
"""

from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor

from .numba_dequant import native_kernel, unpack_by
from .numba_jit import ZERO, jit
from .numba_memory import aligned, load, sum_of_lanes
from .numba_native import address, bytes_at, floats_at, in_parts, reader_of
from .numba_vector import helper, splat

MOST = 4  # vectors; with more of them a product by torch wins
LANES = 64  # of a sum, so columns must be whole sixty-fours
_TILE = 2**15  # weights: 128 KiB


class _Told(NamedTuple):
    """What the threads are told, see `matvec`; names of tensors are addresses."""

    x: int
    blocks: int
    out: int
    vectors: int
    columns: int
    rows: int
    row_size: int  # in bytes
    unpack: int  # code for `unpack_by`
    grid: int
    codes: int


_told = reader_of(_Told)


@helper
def _dot(a, at, b, start, n, lanes):
    """The sum of a[at + i] * b[start + i], i < n."""
    p = q = r = s = splat(ZERO)
    for i in range(0, n, LANES):
        p += load(a, at + i) * load(b, start + i)
        q += load(a, at + i + 16) * load(b, start + i + 16)
        r += load(a, at + i + 32) * load(b, start + i + 32)
        s += load(a, at + i + 48) * load(b, start + i + 48)
    return sum_of_lanes((p + q) + (r + s), lanes)


@jit
def _multiply(told, first, end):
    """Rows `first` to `end` of the matrix."""
    t = _told(told)
    x, out = floats_at(t.x, t.vectors * t.columns), floats_at(t.out, t.vectors * t.rows)
    tile, lanes = aligned((end - first) * t.columns), aligned(16)
    data = bytes_at(t.blocks + first * t.row_size, (end - first) * t.row_size)
    unpack_by(t.unpack, t.grid, t.codes, data, tile)
    for row in range(first, end):
        for v in range(t.vectors):
            at = (row - first) * t.columns
            out[v * t.rows + row] = _dot(tile, at, x, v * t.columns, t.columns, lanes)


def matvec(blocks: Tensor, qtype: T, x: Tensor) -> Tensor:
    """x (vectors, columns) float32 times the transpose of a matrix -> (vectors, rows) float32.

    blocks: (rows, bytes of a row) uint8 of a type in `numba_dequant.COMPILED`, on the CPU.
    """
    (vectors, columns), (rows, row_size) = x.shape, blocks.shape
    x, blocks = x.contiguous(), blocks.contiguous()
    out = torch.empty(vectors, rows, dtype=torch.float32, device="cpu")
    unpack, grid = native_kernel(qtype, torch.float32)
    told = _Told(
        address(x, torch.float32),
        address(blocks, torch.uint8),
        out.data_ptr(),
        vectors=vectors,
        columns=columns,
        rows=rows,
        row_size=row_size,
        unpack=unpack,
        grid=grid.ctypes.data,
        codes=len(grid),
    )
    in_parts(_multiply, told, rows, max(1, _TILE // columns), columns)
    return out
