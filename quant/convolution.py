"""Convolutions by a compiled kernel, on the CPUs where torch's takes longer."""

from functools import cache
from threading import get_ident
from types import ModuleType

import torch
from torch import Tensor

from .kernels import find_kernels

_FEWEST = 32  # tiles of four by four pixels, for which turning the filters pays


class Convolution:
    """The 3×3 convolutions of one network, which share the memory for their turned filters (four
    times the largest's own)."""

    def __init__(self):
        self.rooms: dict[int, Tensor] = {}  # of each thread

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """x (pictures, channels, height, width) with weight (outputs, channels, 3, 3), stride one,
        padded by one, float32 on the CPU -> (pictures, outputs, height, width), its channels side
        by side in memory; None where torch's does as well.

        Products and sums are float32's, but in another form: the error against float64 is below
        1e-5 of the result in the mean square (torch's: 1e-6).
        """
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if needs_gradient or x.dim() != 4 or not convolves(weight):
            return None
        kernel = _kernel()
        if not (x.is_cpu and x.dtype == torch.float32 and kernel.tiles(x) >= _FEWEST):
            return None
        return kernel.convolve(
            x, weight, bias, self._room(kernel.PLANES * weight[..., 0, 0].numel())
        )

    def _room(self, size: int) -> Tensor:
        thread = get_ident()
        if thread not in self.rooms or self.rooms[thread].numel() < size:
            self.rooms.pop(thread, None)
            with torch.inference_mode(False):  # so that it can be written to in any mode
                self.rooms[thread] = torch.empty(size)
        return self.rooms[thread]


def convolves(weight: Tensor) -> bool:
    """Whether there is a kernel on this CPU for a convolution with `weight`."""
    return (
        weight.is_cpu
        and weight.dtype == torch.float32
        and weight.shape[2:] == (3, 3)
        and not (weight.shape[0] % 16 or weight.shape[1] % 16)
        and not torch.compiler.is_compiling()
        and _kernel() is not None
    )


@cache
def _kernel() -> ModuleType | None:
    """The compiled kernel, if numba is there and the CPU has no more than the instructions."""
    doing = "convolving on the CPU"
    tile = find_kernels("numba_tile", doing)
    found = tile is not None and tile.SUPPORTED and torch.float32 == tile.DTYPE
    return find_kernels("numba_conv", doing) if found else None
