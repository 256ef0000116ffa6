"""How far a quantised tensor is from the original, summed up piece by piece in float64."""

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .kernels import find_kernels


@dataclass
class Errors:
    """Running sums over pairs (original x, stored y): Σ(x−y)², Σx², Σy², Σxy, max|x−y|.

    nonfinite: pairs left out since one of them is NaN or infinite.
    """

    count: int = 0
    nonfinite: int = 0
    squared_error: float = 0.0
    squared_x: float = 0.0
    squared_y: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Both float32 of one shape."""
        x, y = x.reshape(-1), y.reshape(-1)
        sums = _sums(x, y)
        if not all(map(math.isfinite, sums)):  # NaN, infinity, or squares too large for float32
            finite = x.isfinite() & y.isfinite()
            self.nonfinite += finite.numel() - int(finite.sum())
            x, y = x[finite].double(), y[finite].double()
            sums = _sums(x, y)
        self.count += x.numel()
        self.squared_error += sums[0]
        self.squared_x += sums[1]
        self.squared_y += sums[2]
        self.product += sums[3]
        self.largest = max(self.largest, sums[4])

    def merge(self, other: "Errors") -> None:
        """Add the sums of `other`."""
        self.count += other.count
        self.nonfinite += other.nonfinite
        self.squared_error += other.squared_error
        self.squared_x += other.squared_x
        self.squared_y += other.squared_y
        self.product += other.product
        self.largest = max(self.largest, other.largest)

    @property
    def rmse(self) -> float:
        """Root of the mean squared error, in the weights' own unit."""
        return math.sqrt(self.squared_error / self.count) if self.count else 0.0

    @property
    def relative(self) -> float:
        """‖x − y‖ / ‖x‖; infinite where only x is zero."""
        if self.squared_x:
            return math.sqrt(self.squared_error / self.squared_x)
        return math.inf if self.squared_error else 0.0

    @property
    def cosine(self) -> float:
        """x·y / (‖x‖ ‖y‖); 1 where both are zero."""
        norms = math.sqrt(self.squared_x * self.squared_y)
        if norms:
            return min(1.0, self.product / norms)
        return 1.0 if self.squared_x == self.squared_y else 0.0


_PIECE = 2**14  # float32 sums of so many terms, then float64: seven digits, at a tenth of the time


def all_finite(x: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity."""
    if x.is_cpu and x.dtype == torch.float32 and x.is_contiguous() and (kernels := _kernels()):
        return kernels.all_finite(x.detach().view(-1).numpy())
    return not x.numel() or bool(torch.stack(x.aminmax()).isfinite().all())  # NaN shows in both


@cache
def _kernels() -> ModuleType | None:
    """The compiled kernels, if numba is there and works."""
    return find_kernels("numba_measure", "measuring errors")


def _sums(x: Tensor, y: Tensor) -> tuple[float, float, float, float, float]:
    """Σ(x−y)², Σx², Σy², Σxy, max|x−y| of 1-D tensors; not finite where they are not."""
    if x.is_cpu and x.dtype == torch.float32 and (kernels := _kernels()):
        out = np.empty(5)
        kernels.sums(x.contiguous().numpy(), y.contiguous().numpy(), out)
        return tuple(out.tolist())
    error = x - y
    low, high = error.aminmax() if error.numel() else (torch.zeros(()), torch.zeros(()))
    pairs = ((error, error), (x, x), (y, y), (x, y))
    return *(_dot(a, b) for a, b in pairs), max(-float(low), float(high))


def _dot(x: Tensor, y: Tensor) -> float:
    whole = x.numel() // _PIECE * _PIECE
    sums = torch.linalg.vecdot(x[:whole].view(-1, _PIECE), y[:whole].view(-1, _PIECE))
    return float(sums.double().sum()) + float(x[whole:].double() @ y[whole:].double())
