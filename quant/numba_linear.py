"""A quantised matrix times many vectors on CPUs, without writing the matrix out.

Vectors are packed once as `numba_tile.py` reads them, on CPUs with AVX-512 BF16 rounded to
bfloat16. Each thread then unpacks a tile of rows to that type, which stays in its cache while all
the vectors meet it. So neither the unpacked matrix nor the vectors' and the results' roundings pass
through memory; sums, bias and results are float32.
"""

from math import lcm

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor
from torch.nn.functional import pad

from .numba_bytes import put
from .numba_dequant import kernel, writable
from .numba_jit import jit
from .numba_memory import aligned, load, transpose
from .numba_tile import COLUMNS, DTYPE, NUMBERS, ROWS, add_tile, hold, pack_rows, release
from .numba_vector import LANES, helper
from .threads import in_threads
from .types import PLAIN_QTYPES

LowRank = tuple[Tensor, Tensor]

UNPACKED = PLAIN_QTYPES[DTYPE]  # of a matrix as it is multiplied
_STEP = 4 * LANES  # vectors that meet a tile at once
_SLICE, _MOST = lcm(ROWS, LANES), 384  # rows: so many of a tile, at the least and the most
_LARGEST = 2**19 * NUMBERS  # weights of a tile: 2 MiB
_DEPTH = 768  # numbers or pairs that meet before the next rows do: 192 KiB of _STEP vectors
_NONE = np.empty(0, np.float32)


@jit
def _pack(x, vectors, width, first, end, panel):
    row = aligned(LANES * width // NUMBERS)
    pack_rows(x, 0, width, vectors, first, end, width, row, panel)


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
        sums[:] = np.float32(0)
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
    (vectors, columns), rows, depth = x.shape, len(blocks), x.shape[1] // NUMBERS
    row_size, data = blocks.shape[1], blocks.contiguous().view(-1).numpy()
    unpack = kernel(qtype) if qtype != UNPACKED else None
    padded, out = -(-vectors // LANES) * LANES, _room(vectors, rows)
    added = x.new_zeros(rows) if bias is None else bias.detach().float().contiguous()
    panel, added = _room(padded * depth).numpy(), added.numpy()
    flat, result = x.contiguous().view(-1).numpy(), writable(out)
    up, down = (_NONE, _NONE) if factors is None else (_flat(factor) for factor in factors)
    rank = 0 if factors is None else factors[0].shape[1]
    low, low_panel = (_room(padded * n).numpy() for n in (rank, rank // NUMBERS))
    zeros = np.zeros(rank, np.float32)

    def pack(first: int, end: int) -> None:
        first, end = first * LANES, end * LANES
        _pack(flat, vectors, columns, first, end, panel)
        end = min(end, vectors)
        for row in range(0, rank, _MOST):
            part, a = min(_MOST, rank - row), down[row * depth :]
            _multiply(a, part, panel, depth, _NONE, _NONE, 0, first, end, zeros, low, row, rank)
        if rank:
            _pack(low, vectors, rank, first, end, low_panel)

    # Few tiles, since each of their calls waits for the GIL, but one for each thread.
    share = -(-rows // torch.get_num_threads())
    step = max(_SLICE, min(_MOST, _LARGEST // columns, share + _SLICE - 1) // _SLICE * _SLICE)

    def work(first: int, end: int) -> None:
        a = _room(step * depth).numpy()
        as_numbers = a.view(np.uint16) if NUMBERS == 2 else a
        for row in range(first * step, min(end * step, rows), step):
            count = min(step, rows - row)
            part, tile = data[row * row_size : (row + count) * row_size], a
            if unpack:
                unpack(part, as_numbers[: count * columns])
            elif count % ROWS:
                a[: count * depth] = part.view(np.float32)
            else:
                tile = part.view(np.float32)
            lows = (up, low_panel, rank // NUMBERS)
            _multiply(tile, count, panel, depth, *lows, 0, vectors, added, result, row, rows)

    in_threads(pack, padded // LANES, LANES * columns)
    in_threads(work, -(-rows // step), step * columns)
    return out


def _room(*shape: int) -> Tensor:
    """Of float32, beginning with a line of the cache."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _flat(factor: Tensor) -> np.ndarray:
    """Its bytes as float32."""
    return factor.view(torch.uint8).view(-1).numpy().view(np.float32)
