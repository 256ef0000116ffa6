"""Multiplying a quantised matrix on a GPU without unpacking it, where that is faster there.

For a few vectors it saves writing the unpacked matrix and reading it again; for many, unpacking
once and torch's product win. Where one passes into the other depends on the GPU, the block format
and the matrix, so both are timed, once for each kind of product and process, on blocks of zeros:
how long they take does not depend on the numbers. Both round the weights to the vectors' type and
sum in float32, but in another order, so the last bit of a result may depend on who won; a near tie
goes to torch, lest it change from run to run.
"""

import logging
from functools import cache
from types import ModuleType

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor
from torch.nn.functional import linear

from .dequant import dequantize
from .kernels import find_kernels

log = logging.getLogger(__name__)

MOST = 1024  # vectors: beyond, no program holds enough of them, and timing would be in vain
MARGIN = 0.9  # of torch's time that the fused product may take

Kind = tuple[GGMLQuantizationType, torch.dtype, torch.device, int, int, int]

_faster: dict[Kind, bool] = {}
_failed: set[str] = set()  # kinds of device whose kernels cannot be built


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
    if kind not in _faster:
        if _captured(x.device):
            return False
        _faster[kind] = _time_both(kernels, tuple(blocks.shape), qtype, x)
    return _faster[kind]


def multiply_fused(
    blocks: Tensor, qtype: GGMLQuantizationType, x: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """x (vectors, columns) times the transpose of a matrix of `qtype`, plus bias, in x's type, as
    `prefers_fused` allowed; None, and a line in the log, where the kernel cannot be built.

    blocks: (rows, bytes of a row) uint8, on x's device.
    """
    if (kernels := _kernels(x.device.type)) is None:
        return None
    try:
        return kernels.linear(blocks, qtype, x, bias)
    except kernels.FAILURES as error:
        _give_up(x.device.type, error)
        return None


def kind_of(rows: int, qtype: GGMLQuantizationType, x: Tensor) -> Kind:
    """What products have in common that are taken to be alike: sizes up to the same power of 2."""
    sizes = (*x.shape, rows)
    return (qtype, x.dtype, x.device, *((size - 1).bit_length() for size in sizes))


def _captured(device: torch.device) -> bool:
    """Whether what is done goes into a CUDA graph, which can't be timed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _time_both(
    kernels: ModuleType, shape: tuple[int, int], qtype: GGMLQuantizationType, x: Tensor
) -> bool:
    """Whether the fused product takes less than MARGIN of the time."""
    rows, (vectors, columns) = shape[0], x.shape
    try:
        blocks = torch.zeros(shape, dtype=torch.uint8, device=x.device)
        fused = kernels.milliseconds(lambda: kernels.linear(blocks, qtype, x), x.device)
        plain = kernels.milliseconds(
            lambda: linear(x, dequantize(blocks, qtype, (rows, columns), x.dtype)), x.device
        )
    except torch.OutOfMemoryError:
        log.info("no memory to time products of %s by: torch multiplies them", qtype.name)
        return False
    except kernels.FAILURES as error:
        _give_up(x.device.type, error)
        return False
    log.debug(
        "%d vectors times %s (%d, %d): fused %.3f ms, unpacked first %.3f ms",
        *(vectors, qtype.name, rows, columns, fused, plain),
    )
    return fused < MARGIN * plain


def _kernels(device: str) -> ModuleType | None:
    """The compiled kernels for a kind of device, if there are any that work."""
    return None if device in _failed else _found(device)


@cache
def _found(device: str) -> ModuleType | None:
    if device != "cuda":
        return None
    return find_kernels("triton_linear", "multiplying few vectors on cuda")


def _give_up(device: str, error: Exception) -> None:
    """Unpack first from now on, and say once why; no memory is another matter."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    _failed.add(device)
    log.warning("multiplying few vectors on %s by plain torch, which is slower: %s", device, error)
