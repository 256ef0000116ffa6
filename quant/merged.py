"""Dequantising a matrix with LoRAs already in it.

Beside a matrix, a LoRA's work grows with the vectors that are multiplied; in it, with the matrix.
So for many vectors the sum of both, rounded once, is the cheaper way. A Triton kernel makes it as
it unpacks, on tensor cores, which is cheaper for few, too, if the matrix is unpacked for them at
all; elsewhere torch adds to the floats, some rows at a time.
"""

from functools import cache
from types import ModuleType

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from .dequant import _CPU_TILE, _DEVICE_TILE, dequantize
from .kernels import Fallback, find_kernels

_LEAST = (8, 0)  # compute capability
_fallback = Fallback("adding LoRAs while dequantising")


def dequantize_merged(
    blocks: Tensor, qtype: GGMLQuantizationType, up: Tensor, down: Tensor, out: Tensor
) -> Tensor:
    """The matrix of `blocks` plus the transpose of down (columns, rank) times up (rank, rows), into
    out (rows, columns): summed in float32 and rounded once to out's type.

    blocks: (rows, bytes of a row) uint8; up and down of out's type. All contiguous on one device.
    Raises: GGUFError for an unknown type or sizes that do not fit.
    """
    if _by_kernel(blocks, qtype, up, down, out):
        return out
    step = max(1, (_CPU_TILE if out.is_cpu else _DEVICE_TILE) // out.shape[1])
    up, down, whole = up.float().T, down.float().T, out.dtype == torch.float32
    for first in range(0, len(out), step):
        rows = slice(first, first + step)
        tile = out[rows] if whole else torch.empty_like(out[rows], dtype=torch.float32)
        dequantize(blocks[rows], qtype, tile.shape, out=tile)
        tile.addmm_(up[rows], down)
        if not whole:
            out[rows] = tile
    return out


def merges_unpacking(qtype: GGMLQuantizationType, x: Tensor, columns: int, rank: int) -> bool:
    """Whether `dequantize_merged` has a kernel for matrices on x's device, in x's type: one that
    takes hardly more time than dequantising.
    """
    if torch.compiler.is_compiling() or (kernels := _kernels(x.device.type)) is None:
        return False
    return (
        qtype in kernels.COMPILED
        and x.dtype in kernels.DTYPES
        and not columns % GGML_QUANT_SIZES[qtype][0]
        and rank <= kernels.MOST
        and _fallback.allows((qtype, x.dtype, x.device), _LEAST)
    )


def _by_kernel(
    blocks: Tensor, qtype: GGMLQuantizationType, up: Tensor, down: Tensor, out: Tensor
) -> bool:
    """Whether a kernel has made the sum."""
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    rows, columns = out.shape
    whole = blocks.shape == (rows, columns // block_size * type_size)
    if not whole or not merges_unpacking(qtype, out, columns, len(up)):
        return False
    kernels = _kernels(out.device.type)
    try:
        kernels.merge(blocks, qtype, up, down, out)
    except kernels.FAILURES as error:
        _fallback.after(error, (qtype, out.dtype, out.device), kernels.OF_A_KIND)
        return False
    return True


@cache
def _kernels(device: str) -> ModuleType | None:
    """The compiled kernels for a kind of device, if there are any."""
    if device not in ("cuda", "xpu"):
        return None
    return find_kernels("triton_merged", f"adding LoRAs while dequantising on {device}")
