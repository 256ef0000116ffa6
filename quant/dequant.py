"""From blocks to floats: tiles that stay in cache, float32 inside, one rounding at the end.

An eager torch formula makes a dozen passes over its data. On a large weight each would go through
main memory, so a CPU takes the blocks in tiles that stay in its last cache and are yet long enough
to hide what starting an operation costs; a tile is cast while it is copied to its place. Other
devices take larger tiles, which bound the memory, and torch.compile, which fuses the passes, all.
Where numba is installed, its kernels do the work on the CPU, where triton is, its on a GPU: the
same numbers, much faster.
"""

import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from .errors import GGUFError
from .kernels import Fallback, find_kernels
from .types import PLAIN_QTYPES, PLAIN_TYPES, QTYPES, find_type

_CPU_TILE = 2**19  # weights: 2 MiB of float32; best of 2**14 … 2**24 for K-quants on one core
_DEVICE_TILE = 2**24  # weights: 64 MiB of float32

_LEAST, _BFLOAT16 = (7, 0), (8, 0)  # compute capability that kernels take, and those to bfloat16
_fallback = Fallback("dequantising")


def dequantize(
    blocks: Tensor,
    qtype: GGMLQuantizationType,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Unpack `blocks` (uint8, any shape with the right number of bytes) to `shape`.

    float32 results equal gguf-py's bit for bit; other dtypes are those rounded once. Rows need not
    be whole blocks as long as the whole is. `out` (contiguous, of `shape`) takes the result in its
    own dtype. A plain type that already has `dtype` comes back as a view of `blocks`.

    Raises: GGUFError for an unknown type or sizes that do not fit.
    """
    qtype = find_type(qtype)
    shape = tuple(shape)
    _check_sizes(blocks, qtype, shape, out)
    if qtype in PLAIN_TYPES:
        values = as_plain(blocks, PLAIN_TYPES[qtype]).view(shape)
        return values.to(dtype) if out is None else out.copy_(values)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    _unpack(blocks.reshape(-1, QTYPES[qtype].type_size), qtype, out)
    return out


def dequantize_rows(
    blocks: Tensor,
    qtype: GGMLQuantizationType,
    row_length: int,
    rows: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(*rows.shape, row_length): the asked-for rows of a matrix, and no others, unpacked.

    blocks: (n, bytes of a row) uint8; rows: integer tensor of any shape, on the same device.
    Raises: GGUFError if a row of `row_length` weights is not what a row of `blocks` holds.
    """
    if blocks.dim() != 2:
        raise GGUFError(f"rows of blocks are a 2-D tensor, not one of shape {tuple(blocks.shape)}")
    picked = blocks.index_select(0, rows.flatten())
    return dequantize(picked, qtype, (*rows.shape, row_length), dtype)


def multiply_few(
    blocks: Tensor,
    qtype: GGMLQuantizationType,
    x: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """x (vectors, columns) float32 times the transpose of a matrix of `qtype`, float32 throughout,
    without unpacking all of the matrix; None where no kernel does that faster than a product in
    `dtype`: bfloat16's by AMX are faster.

    blocks: (rows, bytes of a row) uint8.
    """
    if torch.compiler.is_compiling() or not blocks.is_cpu or (kernels := _kernels("cpu")) is None:
        return None
    from . import numba_jit, numba_matvec

    if dtype == torch.bfloat16 and numba_jit.AMX:
        return None
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    row = x.shape[1] // block_size * type_size
    if (
        qtype not in kernels.COMPILED
        or len(x) > numba_matvec.MOST
        or x.shape[1] % max(block_size, numba_matvec.LANES)
        or blocks.shape[1:] != (row,)
    ):
        return None
    return numba_matvec.matvec(blocks, qtype, x)


def multiply_many(
    blocks: Tensor,
    qtype: GGMLQuantizationType,
    x: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """x (vectors, columns) float32 times the transpose of a matrix of `qtype`, plus bias, without
    unpacking all of the matrix; None where no kernel does that in `dtype` faster than a product.

    Matrix and x are rounded to `dtype`, bfloat16 or float32; sums and results are float32. blocks:
    (rows, bytes of a row) uint8, quantised or of `dtype`. `factors`, as `low_rank_factors` gives
    them, are added to the matrix as a product.
    """
    if not blocks.is_cpu or not multiplies_many(blocks.shape, qtype, x.shape[1], dtype):
        return None
    from . import numba_linear

    return numba_linear.linear(blocks, qtype, x, bias, factors)


def multiplies_many(
    shape: Sequence[int], qtype: GGMLQuantizationType, columns: int, dtype: torch.dtype
) -> bool:
    """Whether `multiply_many` has a kernel on this CPU for blocks of `shape`, in `dtype`."""
    if torch.compiler.is_compiling() or (kernels := _kernels("cpu")) is None:
        return False
    from . import numba_tile

    if not numba_tile.SUPPORTED or dtype != numba_tile.DTYPE:
        return False
    (rows, size), (block_size, type_size) = shape, GGML_QUANT_SIZES[qtype]
    return (
        qtype in kernels.COMPILED | {PLAIN_QTYPES[dtype]}
        and not columns % max(block_size, 32)
        and not rows % 16
        and size == columns // block_size * type_size
        and rows >= 48 * torch.get_num_threads()
    )


def low_rank_factors(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """up (rows, rank) and down (rank, columns), as `multiply_many` takes them where it has a
    kernel."""
    from . import numba_linear

    return numba_linear.low_rank(up, down)


def as_plain(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as a 1-D tensor of `dtype`: a view where they start on a whole element."""
    flat = blocks.reshape(-1)
    return (flat.clone() if flat.storage_offset() % dtype.itemsize else flat).view(dtype)


def _unpack(blocks: Tensor, qtype: GGMLQuantizationType, out: Tensor) -> None:
    """(n, type_size) uint8 into `out`, tile by tile."""
    row = QTYPES[qtype]
    flat = out.view(-1, row.block_size)
    if torch.compiler.is_compiling():
        flat.copy_(row.dequantize_blocks(blocks))
        return
    kernels = _kernels(out.device.type) if blocks.device == out.device else None
    if kernels and qtype in kernels.COMPILED and out.dtype in kernels.DTYPES:
        kind = (qtype, out.dtype, out.device)
        if _fallback.allows(kind, _BFLOAT16 if out.dtype == torch.bfloat16 else _LEAST):
            try:
                kernels.unpack(blocks, qtype, flat)
                return
            except kernels.FAILURES as error:
                _fallback.after(error, kind, kernels.OF_A_KIND)
    step = (_CPU_TILE if blocks.is_cpu else _DEVICE_TILE) // row.block_size
    for start in range(0, len(blocks), step):
        flat[start : start + step] = row.dequantize_blocks(blocks[start : start + step])


@cache
def _kernels(device: str) -> ModuleType | None:
    """The compiled kernels for a kind of device, if there are any."""
    name = {"cpu": "numba", "cuda": "triton", "xpu": "triton"}.get(device)
    return find_kernels(f"{name}_dequant", f"dequantising on {device}") if name else None


def _check_sizes(
    blocks: Tensor, qtype: GGMLQuantizationType, shape: tuple[int, ...], out: Tensor | None
) -> None:
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    if blocks.dtype != torch.uint8:
        raise GGUFError(f"{qtype.name} blocks are uint8, not {blocks.dtype}")
    weights = math.prod(shape)
    if weights % block_size:
        raise GGUFError(
            f"{qtype.name} packs {block_size} weights a block, which does not divide {shape}"
        )
    expected = weights // block_size * type_size
    if blocks.numel() != expected:
        raise GGUFError(
            f"{qtype.name} of shape {shape} takes {expected} bytes, not {blocks.numel()}"
        )
    if out is not None and (tuple(out.shape) != shape or not out.is_contiguous()):
        raise GGUFError(f"`out` is not a contiguous tensor of shape {shape}")
