"""A quantised matrix times a few vectors on GPUs, without writing the matrix out.

Each program takes N rows of the matrix and M vectors. It unpacks the rows a slice of columns at a
time, by the functions of triton_dequant.py, rounds them to the vectors' type, as dequantising
would, and multiplies them where they are, in registers; sums are float32. So the blocks are read
once for M vectors, and nothing else of the matrix passes through memory. With more vectors each row
is unpacked for every M of them: then dequantising once is faster, and fused.py finds out when.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor
from triton.testing import do_bench

from .triton_dequant import (
    COMPILED,
    DTYPES,
    FAILURES,
    FORMATS,
    OF_A_KIND,
    aligned,
    announce,
    beside,
    current,
    levels,
)

__all__ = ["COMPILED", "DTYPES", "FAILURES", "OF_A_KIND", "linear", "milliseconds"]

_LEAST = 16  # vectors of a program: tensor cores take no fewer
_MOST = 256  # bytes of a column of them: with more, float32's sums spill on sm_90
_ROWS = 32  # of a program: few, so that a matrix of 4096 gives every part of a GPU some


@triton.jit
def _add_product(got, x, seen, offset: tl.constexpr, w):
    """got (M, N) float32 + what is at x (M, lanes) times w (N, lanes) transposed."""
    a = tl.load(x + offset, mask=seen, other=0)
    return tl.dot(a, tl.trans(w.to(a.dtype)), got, input_precision="ieee")


@triton.jit
def _add_product_exactly(got, x, seen, offset: tl.constexpr, w):
    """The same numbers in float32: Triton's interpreter multiplies bfloat16's bits as integers."""
    a = tl.load(x + offset, mask=seen, other=0)
    b = tl.trans(w.to(a.dtype)).to(tl.float32)
    return tl.dot(a.to(tl.float32), b, got, input_precision="ieee")


@triton.jit(do_not_specialize=["vectors"])
def _linear(
    x,
    data,
    bias,
    out,
    vectors,
    rows,
    columns,
    levels,
    unpack: tl.constexpr,
    take: tl.constexpr,
    width: tl.constexpr,
    size: tl.constexpr,
    lanes: tl.constexpr,
    beside: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """x (vectors, columns) times the transpose of data (rows, bytes), plus bias -> out.

    `beside` blocks of a row lie side by side in the lanes, where one of them has too few.
    """
    n, m = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * M + tl.arange(0, M)
    lane, blocks = tl.arange(0, lanes * beside)[None, :], columns // size
    row = data + tl.minimum(n, rows - 1).to(tl.int64)[:, None] * blocks * width
    vector = x + m.to(tl.int64)[:, None] * columns
    sums = tl.full((M, N), 0, tl.float32)  # `zeros` is not for the interpreter
    for first in range(0, blocks, beside):
        seen, block = m[:, None] < vectors, first
        if beside > 1:
            block = first + lane // lanes
            seen &= block < blocks
            block = tl.minimum(block, blocks - 1)
        part = vector + block * size + lane % lanes
        sums = unpack(row + block * width, lane % lanes, levels, take, part, seen, sums)
    if bias is not None:
        sums += tl.load(bias + n, mask=n < rows, other=0).to(tl.float32)[None, :]
    to, live = out + m.to(tl.int64)[:, None] * rows + n[None, :], m[:, None] < vectors
    tl.store(to, sums.to(out.dtype.element_ty), mask=live & (n[None, :] < rows))


def linear(blocks: Tensor, qtype: T, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (vectors, columns) of one of DTYPES times the transpose of a matrix of one of COMPILED,
    plus bias -> (vectors, rows) in x's type. Whole blocks in a row.

    blocks: (rows, bytes of a row) uint8; all on one GPU.
    Raises: one of FAILURES where no kernel can be built.
    """
    (vectors, columns), rows = x.shape, len(blocks)
    size, width = GGML_QUANT_SIZES[qtype]
    function, lanes = FORMATS[qtype]
    out = x.new_empty(vectors, rows)
    M = min(_MOST // x.itemsize, max(_LEAST, triton.next_power_of_2(vectors)))
    announce("multiplying", qtype, x.dtype, x.device)
    with current(x.device):
        _linear[triton.cdiv(rows, _ROWS), triton.cdiv(vectors, M)](
            x.contiguous(),
            aligned(blocks),
            bias,
            out,
            vectors,
            rows,
            columns,
            levels(qtype, x.device),
            unpack=function,
            take=_add_product_exactly if x.is_cpu else _add_product,
            width=width,
            size=size,
            lanes=lanes,
            beside=beside(lanes, size),
            M=M,
            N=_ROWS,
            enable_fp_fusion=False,
            num_stages=1,  # 2 would take 70 KiB of shared memory for the slices of a K-quant
        )
    return out


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """What `run` takes on a GPU, by its own events: the median of some runs, each of which finds
    its matrix in main memory, as a model's do, not in the cache.
    """
    with current(device):
        return do_bench(run, warmup=5, rep=20, return_mode="median")
