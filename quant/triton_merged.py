"""A quantised matrix plus the product of two narrow ones on GPUs, in one pass from its blocks.

Each program takes N rows of the matrix and a few blocks of each. It unpacks them by the functions
of triton_dequant.py and adds the product to the float32 numbers while they are in registers. So
nothing passes through memory but what dequantising reads and writes, and the narrow ones, which the
cache holds: memory is still the bound, by what bench/sass.py counts.
"""

import torch
import triton
import triton.language as tl
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor

from .triton_dequant import (
    COMPILED,
    FAILURES,
    FORMATS,
    OF_A_KIND,
    aligned,
    announce,
    beside,
    current,
    levels,
)

__all__ = ["COMPILED", "DTYPES", "FAILURES", "MOST", "OF_A_KIND", "merge"]

_ROWS = 64  # of a program: two warps on Hopper share what is multiplied, as no fewer rows do
_COLUMNS = 256  # of a program: a large block
_LEAST = 16  # ranks: tensor cores take no fewer
MOST = 256  # of them: with more, registers spill
_STAGES = 2  # 3 would take 100 KiB of shared memory for 256 ranks
# float32's products are not for tensor cores, and take minutes to build.
DTYPES = frozenset({torch.float16, torch.bfloat16})


@triton.jit
def _store_sum(got, to, seen, offset: tl.constexpr, w):
    """The weights w (N, lanes) plus up (N, R) times R ranks of down, where they belong."""
    up, down, rank, live = got
    part = tl.load(down + offset * rank, mask=live, other=0)
    tl.store(to + offset, tl.dot(up, part, w, input_precision="ieee"), mask=seen)
    return got


@triton.jit
def _store_sum_exactly(got, to, seen, offset: tl.constexpr, w):
    """The same numbers in float32: Triton's interpreter multiplies bfloat16's bits as integers."""
    up, down, rank, live = got
    part = tl.load(down + offset * rank, mask=live, other=0).to(tl.float32)
    tl.store(to + offset, tl.dot(up.to(tl.float32), part, w, input_precision="ieee"), mask=seen)
    return got


@triton.jit
def _merge(
    data,
    up,
    down,
    out,
    rows,
    columns,
    rank,
    levels,
    unpack: tl.constexpr,
    take: tl.constexpr,
    width: tl.constexpr,
    size: tl.constexpr,
    lanes: tl.constexpr,
    beside: tl.constexpr,
    turns: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    """data (rows, bytes) + (down (columns, rank) times up (rank, rows)) transposed -> out.

    `beside` blocks of a row lie side by side in the lanes, `turns` times.
    """
    n, r = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, R)
    lane, blocks = tl.arange(0, lanes * beside)[None, :], columns // size
    factor = up + r[None, :] * rows + n[:, None]
    factor = tl.load(factor, mask=(r[None, :] < rank) & (n[:, None] < rows), other=0)
    place = tl.minimum(n, rows - 1)[:, None].to(tl.int64)
    row = data + place * blocks * width
    for turn in range(turns):
        block = (tl.program_id(1) * turns + turn) * beside + lane // lanes
        seen = (n[:, None] < rows) & (block < blocks)
        block = tl.minimum(block, blocks - 1)
        column = block * size + lane % lanes
        got = (factor, down + column * rank + r[:, None], rank, (r < rank)[:, None])
        to = out + place * columns + column
        unpack(row + block * width, lane % lanes, levels, take, to, seen, got)


def merge(blocks: Tensor, qtype: T, up: Tensor, down: Tensor, out: Tensor) -> None:
    """A matrix of one of COMPILED, blocks (rows, bytes of a row) uint8, plus the transpose of down
    (columns, rank) times up (rank, rows) -> out (rows, columns); all three of one of DTYPES,
    contiguous and on one GPU. Whole blocks in a row, and at most MOST ranks.

    Raises: one of FAILURES where no kernel can be built.
    """
    (rows, columns), rank = out.shape, len(up)
    size, width = GGML_QUANT_SIZES[qtype]
    function, lanes = FORMATS[qtype]
    at_once = beside(lanes, size)
    turns = _COLUMNS // (size * at_once)
    announce("adding LoRAs while dequantising", qtype, out.dtype, out.device)
    with current(out.device):
        _merge[triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)](
            aligned(blocks),
            up,
            down,
            out,
            rows,
            columns,
            rank,
            levels(qtype, out.device),
            unpack=function,
            take=_store_sum_exactly if out.is_cpu else _store_sum,
            width=width,
            size=size,
            lanes=lanes,
            beside=at_once,
            turns=turns,
            N=_ROWS,
            R=max(_LEAST, triton.next_power_of_2(rank)),
            enable_fp_fusion=False,
            num_stages=_STAGES,
        )
