"""From floats to blocks: the bytes that ggml's `ggml_quantize_chunk` writes, on any device.

ggml is the oracle (tests/golden): its sums are taken in its order and its roundings by its rules.
Where numba is installed, its kernels do the work for tensors on the CPU: the same bytes, faster.
"""

from functools import cache, partial
from types import ModuleType

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from . import effort as efforts
from .codebook import NEED_IMPORTANCE
from .errors import GGUFError
from .kernels import find_kernels
from .measure import all_finite
from .rounding import divide, ordered_sum, square_root
from .types import PLAIN_TYPES, QTYPES, find_type

_TILE = 2**22  # weights in flight; the torch formulation holds a dozen copies of them
_EXACT_DEVICES = ("cpu", "cuda")  # others may lack float64, which roundings need
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_T = GGMLQuantizationType
# Types whose error ggml weighs by the mean square of the whole row, not of a super-block.
_ROW_WEIGHTED = {_T.Q4_0, _T.Q4_1, _T.Q5_0, _T.Q5_1}


def quantize(
    x: Tensor,
    qtype: GGMLQuantizationType,
    importance: Tensor | None = None,
    effort: str = "ggml",
    out: Tensor | None = None,
) -> Tensor:
    """(rows, cols) float32 -> (rows, bytes) uint8 on the same device, each row in blocks.

    importance: (cols,) float32, none negative: how much a column's squared error counts (ggml's
    imatrix). Types that have nothing to weigh (Q8_0, MXFP4, plain floats) pass it over, as ggml
    does.
    effort: "high" searches longer than ggml, for less error in the same format, where `effort.py`
    knows how to (Q3_K … Q6_K); it writes the other types as ggml does.
    out: contiguous, of the result's shape and device, takes the result.

    Raises: GGUFError for a type that cannot be written, sizes that do not fit, NaN and infinity
    (what `out` then holds is of no use).
    """
    qtype = find_type(qtype)
    _check_type(qtype)
    _check_input(x, qtype)
    high = check_effort(effort) == "high" and qtype in efforts.TYPES
    if importance is not None:
        _check_importance(importance, x)
    elif qtype in NEED_IMPORTANCE:
        raise GGUFError(
            f"{qtype.name} needs an importance, as in ggml: without one it loses too much"
        )
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    out = _output(out, (len(x), x.shape[1] // block_size * type_size), x.device)
    if qtype not in PLAIN_TYPES and x.device.type not in _EXACT_DEVICES:
        importance = None if importance is None else importance.cpu()
        return out.copy_(quantize(x.cpu(), qtype, importance, effort).to(x.device))
    kernels, whole = _kernels_for(x, qtype), x
    if kernels is None and not all_finite(x):
        raise _nonfinite(x, qtype)
    if qtype in PLAIN_TYPES and kernels is None:
        out.view(PLAIN_TYPES[qtype]).copy_(x)
        return out
    x, wide = x.detach().contiguous(), out
    if importance is None or qtype in PLAIN_TYPES:  # then blocks know nothing of their rows
        x, wide, importance = x.view(-1, block_size), out.view(-1, type_size), None
    step = max(1, _TILE // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        if not _quantize_rows(x[part], qtype, importance, wide[part], high, kernels):
            raise _nonfinite(whole, qtype)
    return out


def check_effort(effort: str) -> str:
    """Raises: GGUFError for one that is unknown."""
    if effort not in efforts.EFFORTS:
        raise GGUFError(f"effort {effort!r} is unknown (known: {', '.join(efforts.EFFORTS)})")
    return effort


def writable_types() -> list[GGMLQuantizationType]:
    """The types that `quantize` can write."""
    blocks = [qtype for qtype, row in QTYPES.items() if row.quantize_blocks is not None]
    return [qtype for qtype, dtype in PLAIN_TYPES.items() if dtype in _FLOATS] + blocks


@cache
def _kernels() -> ModuleType | None:
    """The compiled kernels, if numba is there and works."""
    return find_kernels("numba_quantize", "quantising on the CPU")


def _kernels_for(x: Tensor, qtype: GGMLQuantizationType) -> ModuleType | None:
    kernels = _kernels() if x.is_cpu else None
    return kernels if kernels and qtype in kernels.COMPILED else None


def _quantize_rows(
    x: Tensor,
    qtype: GGMLQuantizationType,
    importance: Tensor | None,
    out: Tensor,
    high: bool,
    kernels: ModuleType | None,
) -> bool:
    """(rows, cols) float32 into (rows, bytes) uint8, all rows at once.

    Whether all were finite: the kernels look for themselves; without them it has been looked.
    """
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    blocks, weights = x.view(-1, block_size), None
    if importance is not None:
        if qtype not in _ROW_WEIGHTED:
            weights = importance.expand_as(x)
        elif kernels is None:
            weights = importance * _row_sigma(x)
        else:
            weights = kernels.weigh_rows(x, importance)
        weights = weights.reshape(blocks.shape)
    if kernels is not None:
        return kernels.quantize_blocks(blocks, weights, qtype, out.view(-1, type_size), high)
    write = QTYPES[qtype].quantize_blocks
    if high:
        write = partial(efforts.quantize_blocks, qtype=qtype)
    out.view(-1, type_size).copy_(write(blocks, weights))
    return True


def _row_sigma(x: Tensor) -> Tensor:
    """(rows, cols): sqrt(mean square of the row + x²), as in ggml's `quantize_row_q4_0_impl`."""
    squares = x * x
    sigma2 = divide(ordered_sum(squares.t()), x.shape[1])
    return square_root(sigma2.unsqueeze(1) + squares)


def _check_type(qtype: GGMLQuantizationType) -> None:
    writable = writable_types()
    if qtype not in writable:
        names = ", ".join(known.name for known in writable)
        raise GGUFError(f"{qtype.name} can be read but not written (writable: {names})")


def _check_input(x: Tensor, qtype: GGMLQuantizationType) -> None:
    if x.dtype != torch.float32 or x.dim() != 2:
        raise GGUFError(
            f"quantize takes (rows, cols) float32, not {x.dtype} of shape {tuple(x.shape)}: "
            "reshape it, and cast it with .float()"
        )
    size = QTYPES[qtype].block_size if qtype in QTYPES else 1
    if x.shape[1] % size:
        raise GGUFError(
            f"{qtype.name} packs {size} weights a block, which does not divide rows of "
            f"{x.shape[1]}: choose a type with smaller blocks"
        )


def _nonfinite(x: Tensor, qtype: GGMLQuantizationType) -> GGUFError:
    finite = x.isfinite()
    place = tuple((~finite).nonzero()[0].tolist())
    count = x.numel() - int(finite.sum())
    return GGUFError(
        f"{count} of {x.numel()} weights are NaN or infinite, the first, {x[place].item()}, "
        f"at {place}: {qtype.name} cannot hold them; repair the source"
    )


def _output(out: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=torch.uint8, device=device)
    fits = (out.shape, out.dtype, out.device) == (shape, torch.uint8, device)
    if not fits or not out.is_contiguous():
        raise GGUFError(f"`out` is not contiguous uint8 of shape {shape} on {device}")
    return out


def _check_importance(importance: Tensor, x: Tensor) -> None:
    if importance.dtype != torch.float32 or importance.shape != x.shape[1:]:
        raise GGUFError(
            f"importance is float32 of shape {tuple(x.shape[1:])}, one for each column, not "
            f"{importance.dtype} of shape {tuple(importance.shape)}"
        )
    if importance.device != x.device:
        raise GGUFError(f"importance is on {importance.device}, the weights on {x.device}")
    if not (importance.isfinite() & (importance >= 0)).all():
        raise GGUFError("importance has values that are negative, NaN or infinite: gather it anew")
