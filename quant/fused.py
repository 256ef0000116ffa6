"""Multiplying a quantised matrix on a GPU without unpacking it, where that is faster there.

For a few vectors it saves writing the unpacked matrix and reading it again; for many, unpacking
once and torch's product win. Where one passes into the other depends on the GPU, the block format
and the matrix, so both are timed, once for each kind of product and process, on blocks of zeros:
how long they take hardly depends on the numbers. Both round the weights to the vectors' type and
sum in float32, but in another order, so the last bit of a result may depend on who won; a near tie
goes to torch, lest it change from run to run.
"""

import logging
from collections import Counter
from functools import cache
from threading import Lock
from types import ModuleType

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor
from torch.nn.functional import linear

from .dequant import dequantize
from .kernels import AcceleratorError, Fallback, find_kernels

log = logging.getLogger(__name__)

MOST = 1024  # vectors: beyond, no program holds enough of them, and timing would be in vain
MARGIN = 0.9  # of torch's time that the fused product may take
TRIES = 3  # at timing a kind, where there was no memory for it
_LEAST = (8, 0)  # compute capability

Kind = tuple[GGMLQuantizationType, torch.dtype, torch.device, int, int, int]

_faster: dict[Kind, bool] = {}
_tries: Counter[Kind] = Counter()
_timing = Lock()  # two products timed at once would time each other
_fallback = Fallback("multiplying few vectors")


def prefers_fused(blocks: Tensor, qtype: GGMLQuantizationType, x: Tensor) -> bool:
    """Whether `multiply_fused` is the faster way for x (vectors, columns) on its device and a
    matrix like this one; the first of a kind is timed, both ways.

    blocks: (rows, bytes of a row) uint8, wherever they lie: only their shape is looked at.
    """
    if torch.compiler.is_compiling() or (kernels := _kernels(x.device.type)) is None:
        return False
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    vectors, columns = x.shape
    if (
        qtype not in kernels.COMPILED
        or x.dtype not in kernels.DTYPES
        or not 0 < vectors <= MOST
        or columns % block_size
        or blocks.shape[1:] != (columns // block_size * type_size,)
    ):
        return False
    kind = kind_of(len(blocks), qtype, x)
    if not _fallback.allows(kind, _LEAST):
        return False
    if kind not in _faster and not _captured(x.device):
        with _timing:
            if kind not in _faster:
                _settle(kind, _time_both(kernels, tuple(blocks.shape), qtype, x))
    return _faster.get(kind, False)


def multiply_fused(
    blocks: Tensor, qtype: GGMLQuantizationType, x: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """x (vectors, columns) times the transpose of a matrix of `qtype`, plus bias, in x's type, as
    `prefers_fused` allowed; None, and a line in the log, where the kernel cannot be built.

    blocks: (rows, bytes of a row) uint8, on x's device.
    """
    kernels, kind = _kernels(x.device.type), kind_of(len(blocks), qtype, x)
    if kernels is None or not _fallback.allows(kind, _LEAST):
        return None
    try:
        return kernels.linear(blocks, qtype, x, bias)
    except kernels.FAILURES as error:
        return _fallback.after(error, kind, kernels.OF_A_KIND)


def kind_of(rows: int, qtype: GGMLQuantizationType, x: Tensor) -> Kind:
    """What products have in common that are taken to be alike: sizes up to the same power of 2."""
    sizes = (*x.shape, rows)
    return (qtype, x.dtype, x.device, *((size - 1).bit_length() for size in sizes))


def _captured(device: torch.device) -> bool:
    """Whether what is done there goes into a CUDA graph, which can't be timed."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _settle(kind: Kind, faster: bool | None) -> None:
    """Remember what was timed; torch's way, where that was tried in vain too often."""
    _tries[kind] += 1
    if faster is not None or _tries[kind] == TRIES:
        _faster[kind] = bool(faster)


@torch.no_grad()
def _time_both(
    kernels: ModuleType, shape: tuple[int, int], qtype: GGMLQuantizationType, x: Tensor
) -> bool | None:
    """Whether the fused product takes less than MARGIN of the time; None if it can't be told now.
    Only what the fused one fails by is held against it.
    """
    rows, (vectors, columns) = shape[0], x.shape
    try:
        blocks = torch.zeros(shape, dtype=torch.uint8, device=x.device)
        fused = kernels.milliseconds(lambda: kernels.linear(blocks, qtype, x), x.device)
    except torch.OutOfMemoryError as error:
        return _untimed(qtype, error)
    except kernels.FAILURES as error:
        return _fallback.after(error, kind_of(rows, qtype, x), kernels.OF_A_KIND)
    try:
        plain = kernels.milliseconds(
            lambda: linear(x, dequantize(blocks, qtype, (rows, columns), x.dtype)), x.device
        )
    except AcceleratorError:
        raise
    except kernels.FAILURES as error:
        return _untimed(qtype, error)
    log.debug(
        "%d vectors times %s (%d, %d): fused %.3f ms, unpacked first %.3f ms",
        *(vectors, qtype.name, rows, columns, fused, plain),
    )
    return fused < MARGIN * plain


def _untimed(qtype: GGMLQuantizationType, error: Exception) -> None:
    log.info("products of %s by torch for now, as they could not be timed: %s", qtype.name, error)


@cache
def _kernels(device: str) -> ModuleType | None:
    """The compiled kernels for a kind of device, if there are any."""
    if device != "cuda":
        return None
    return find_kernels("triton_linear", "multiplying few vectors on cuda")
