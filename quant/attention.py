"""Attention by a compiled kernel, on the CPUs where torch's own is slow at bfloat16."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .kernels import find_kernels


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Attention of q (pictures, tokens, heads, width) to k and v (pictures, keys, heads, width),
    float32 on the CPU, in any layout -> like q; None where torch's does as well.

    q, k, v and the probabilities are rounded to bfloat16 once, all sums are in float32: the error
    against float64 is that of torch's kernel in bfloat16.
    """
    (pictures, _, heads, width), fits = q.shape, k.shape == v.shape
    fits &= k.shape == (pictures, k.shape[1], heads, width) and width % 64 == 0
    fits &= all(t.is_cpu and t.dtype == torch.float32 for t in (q, k, v))
    if not fits or k.shape[1] * width > _most():
        return None
    return (_as_operation if torch.compiler.is_compiling() else _attend)(q, k, v)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _kernel().attend(*(t.contiguous() for t in (q, k, v)))


_as_operation = torch.library.custom_op("fewstep::attend", _attend, mutates_args=())


@_as_operation.register_fake
def _(q, k, v):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.compiler.assume_constant_result
def _most() -> int:
    """Numbers of a head's keys up to which there is a kernel that is faster."""
    return 0 if (kernel := _kernel()) is None else kernel.MOST


@cache
def _kernel() -> ModuleType | None:
    """The compiled kernel, if numba is there and the CPU has the instructions."""
    doing = "attending on the CPU"
    tile = find_kernels("numba_tile", doing)
    return find_kernels("numba_attention", doing) if tile and tile.PAIRS else None
