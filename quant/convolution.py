"""Convolutions by a compiled kernel, on the CPUs where torch's takes longer."""

import threading
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .kernels import find_kernels

_FEWEST = 32  # tiles of four by four pixels, for which turning the filters pays


class Convolution:
    """The 3×3 convolutions of one network, which share the memory for their turned filters: in each
    thread four times the largest's own.
    """

    def __init__(self):
        self.kept = threading.local()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """x (pictures, channels, height, width) with weight (outputs, channels, 3, 3), stride one,
        padded by one, float32 on the CPU -> (pictures, outputs, height, width), its channels side
        by side in memory; None where torch's does as well, and for what torch will refuse.

        Products and sums are float32's, but in another form: the error against float64 is below
        1e-5 of the whole result in the mean square (torch's: 1e-6). It spreads over four by four
        pixels, as does what is not finite.
        """
        given = [tensor for tensor in (x, weight, bias) if tensor is not None]
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if needs_gradient or x.dim() != 4 or not convolves(weight):
            return None
        fits = x.shape[1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
        fits &= all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in given)
        kernel = _kernel()
        if not fits or kernel.tiles(x) < _FEWEST:
            return None
        filters = self._filters(kernel.PLANES * weight.shape[0] * weight.shape[1])
        return kernel.convolve(x, weight, bias, filters)

    def _filters(self, size: int) -> Tensor:
        """Memory for so many numbers."""
        filters = getattr(self.kept, "filters", None)
        if filters is None or filters.numel() < size:
            with torch.inference_mode(False):  # so that it can be written to in any mode
                filters = torch.empty(size, dtype=torch.float32, device="cpu")
            self.kept.filters = filters
        return filters


def convolves(weight: Tensor) -> bool:
    """Whether there is a kernel on this CPU for a convolution with `weight`."""
    return (
        weight.is_cpu
        and weight.dtype == torch.float32
        and weight.shape[2:] == (3, 3)
        and weight.numel() > 0
        and not (weight.shape[0] % 16 or weight.shape[1] % 16)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and _kernel() is not None
    )


@cache
def _kernel() -> ModuleType | None:
    """The compiled kernel, if numba is there and the CPU one whose tiles are of float32."""
    doing = "convolving on the CPU"
    tile = find_kernels("numba_tile", doing)
    there = tile is not None and tile.SUPPORTED and tile.DTYPE is torch.float32
    return find_kernels("numba_conv", doing) if there else None
