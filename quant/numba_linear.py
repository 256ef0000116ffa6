"""A quantised matrix times many vectors on CPUs with AVX-512 BF16, without writing the matrix out.

Vectors are rounded to bfloat16 once and packed as the instruction for pairs of products reads them.
Each thread then unpacks a tile of rows to bfloat16, which stays in its second cache while all the
vectors meet it. So neither the unpacked matrix nor the vectors' and the results' roundings pass
through memory; sums, bias and results are float32.
"""

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor
from torch.nn.functional import pad

from .numba_dequant import kernel
from .numba_jit import jit
from .numba_tile import COLUMNS, ROWS, make_tile, pack_rows
from .numba_vector import LANES, helper, load, store, transpose
from .threads import in_threads

LowRank = tuple[Tensor, Tensor]

_STEP = COLUMNS * LANES  # vectors of a tile
_SLICE, _MOST = 48, 384  # rows: whole ROWS and whole LANES; so many of a tile, at the most
_LARGEST = 2**20  # weights of a tile
_PAIRS = 768  # of columns that meet before the next rows do: 192 KiB of _STEP vectors
_NONE = np.empty(0, np.float32)
_tile_1, _tile_2, _tile_3, _tile_4 = (make_tile(n, adds=True) for n in (1, 2, 3, 4))


@jit
def _pack(x, vectors, width, first, end, panel):
    row = np.empty(LANES * width // 2, np.float32)
    pack_rows(x, 0, width, vectors, first, end, width, row, panel)


@helper
def _add(columns, a, at, a_step, b, b_at, b_step, pairs, sums, to):
    if columns == 4:
        _tile_4(a, at, a_step, b, b_at, b_step, pairs, sums, to, _STEP)
    elif columns == 3:
        _tile_3(a, at, a_step, b, b_at, b_step, pairs, sums, to, _STEP)
    elif columns == 2:
        _tile_2(a, at, a_step, b, b_at, b_step, pairs, sums, to, _STEP)
    else:
        _tile_1(a, at, a_step, b, b_at, b_step, pairs, sums, to, _STEP)


@jit
def _multiply(a, rows, panel, pairs, up, low_panel, low_pairs, first, end, bias, out, row, step):
    """out (vectors, step), from column `row` on, for vectors first … end = these times the rows of
    a, plus theirs of low rank times rows `row` … of up, plus bias.

    a and up are read by whole ROWS; for the panels see `pack_rows`.
    """
    sums, square = np.empty(_MOST * _STEP, np.float32), np.empty(LANES * LANES, np.float32)
    for vector in range(first, end, _STEP):
        sums[:] = np.float32(0)
        columns = min(COLUMNS, -(-(end - vector) // LANES))
        for k in range(0, pairs, _PAIRS):
            part, b = min(_PAIRS, pairs - k), vector * pairs + k * LANES
            for r in range(0, rows, ROWS):
                at = r * pairs + k
                _add(columns, a, at, pairs, panel, b, LANES * pairs, part, sums, r * _STEP)
        for r in range(0, rows if low_pairs else 0, ROWS):
            at, b, b_step = (row + r) * low_pairs, vector * low_pairs, LANES * low_pairs
            _add(columns, up, at, low_pairs, low_panel, b, b_step, low_pairs, sums, r * _STEP)
        for r in range(0, rows, LANES):
            added = load(bias, row + r)
            for c in range(0, min(_STEP, end - vector), LANES):
                transpose(sums, r * _STEP + c, _STEP, square, 0)
                for i in range(min(LANES, end - vector - c)):
                    place = (vector + c + i) * step + row + r
                    store(out, place, load(square, i * LANES) + added)


def low_rank(up: Tensor, down: Tensor) -> LowRank:
    """up (rows, rank) and down (rank, columns), as the kernel reads them: bfloat16, the rank filled
    up to whole 32 with zeros, and ROWS rows more than are there.
    """
    more = -up.shape[1] % 32
    up = pad(up.to(torch.bfloat16), (0, more, 0, ROWS))
    return up.contiguous(), pad(down.to(torch.bfloat16), (0, 0, 0, more + ROWS)).contiguous()


def linear(
    blocks: Tensor, qtype: T, x: Tensor, bias: Tensor | None, factors: LowRank | None = None
) -> Tensor:
    """x (vectors, columns) float32 times the transpose of a matrix, plus bias -> (vectors, rows)
    float32. Whole 32 columns, whole 16 rows. `factors`: see `low_rank`; their product is added to
    the matrix.

    blocks: (rows, bytes of a row) uint8 of BF16 or a type in `numba_dequant.COMPILED`, on the CPU.
    """
    (vectors, columns), rows, pairs = x.shape, len(blocks), x.shape[1] // 2
    row_size, data = blocks.shape[1], blocks.contiguous().view(-1).numpy()
    unpack = kernel(qtype) if qtype != T.BF16 else None
    padded, out = -(-vectors // LANES) * LANES, torch.empty(vectors, rows)
    added = torch.zeros(rows) if bias is None else bias.float().contiguous()
    panel, added = np.empty(padded * pairs, np.float32), added.numpy()
    flat, result = x.contiguous().view(-1).numpy(), out.view(-1).numpy()
    up, down = (_NONE, _NONE) if factors is None else (_flat(factor) for factor in factors)
    rank = 0 if factors is None else factors[0].shape[1]
    low, low_panel = (np.empty(padded * n, np.float32) for n in (rank, rank // 2))
    zeros = np.zeros(rank, np.float32)

    def pack(first: int, end: int) -> None:
        first, end = first * LANES, end * LANES
        _pack(flat, vectors, columns, first, end, panel)
        end = min(end, vectors)
        for row in range(0, rank, _MOST):
            part, a = min(_MOST, rank - row), down[row * pairs :]
            _multiply(a, part, panel, pairs, _NONE, _NONE, 0, first, end, zeros, low, row, rank)
        if rank:
            _pack(low, vectors, rank, first, end, low_panel)

    # Few tiles, since each of their calls waits for the GIL, but one for each thread.
    share = -(-rows // torch.get_num_threads())
    step = max(_SLICE, min(_MOST, _LARGEST // columns, share + _SLICE - 1) // _SLICE * _SLICE)

    def work(first: int, end: int) -> None:
        a = np.empty(step * pairs, np.float32)
        as_bfloat16 = a.view(np.uint16)
        for row in range(first * step, min(end * step, rows), step):
            count = min(step, rows - row)
            part, tile = data[row * row_size : (row + count) * row_size], a
            if unpack:
                unpack(part, as_bfloat16[: count * columns])
            elif count % ROWS:
                a[: count * pairs] = part.view(np.float32)
            else:
                tile = part.view(np.float32)
            lows = (up, low_panel, rank // 2)
            _multiply(tile, count, panel, pairs, *lows, 0, vectors, added, result, row, rows)

    in_threads(pack, padded // LANES, LANES * columns)
    in_threads(work, -(-rows // step), step * columns)
    return out


def _flat(factor: Tensor) -> np.ndarray:
    """Pairs of bfloat16 as float32."""
    return factor.view(torch.uint8).view(-1).numpy().view(np.float32)
