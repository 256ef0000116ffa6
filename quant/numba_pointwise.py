"""GELU and RMS norm on CPUs, in float32, in one pass over memory: torch takes a slow hyperbolic
tangent for the one and five passes for the other.
"""

import numpy as np
import torch
from torch import Tensor

from .numba_bytes import put
from .numba_dequant import writable
from .numba_jit import ONE, ZERO, f4, jit
from .numba_memory import aligned, load, sum_of_lanes
from .numba_vector import LANES, bits_of, fused, helper, moved, select, splat
from .threads import in_threads

_LEAST, _MOST = f4(-125.0), f4(125.0)  # exponents
_WHOLE = f4(12582912.0)  # 3 · 2^22: a float32 beside it is rounded to a whole number, its last bits
# exp(-2u) = 2^t of GELU's u = sqrt(2/pi)·(x + 0.044715·x^3), where t = x·(_LINEAR + _CUBIC·x^2)
_LINEAR = f4(-2 * (2 / np.pi) ** 0.5 / np.log(2))
_CUBIC = f4(0.044715 * -2 * (2 / np.pi) ** 0.5 / np.log(2))


@helper
def power_of_2(t):
    """2^t of -125 ≤ t ≤ 125, to 2e-7 of itself, and of less as of -125; NaN stays NaN, if its
    lowest nine bits are zero, as of those that come of bfloat16.
    """
    t = select(t < _LEAST, _LEAST, t)
    whole = t + _WHOLE
    f = t - (whole - _WHOLE)
    v = fused(f, splat(f4(1.32647143e-3)), f4(9.67151264e-3))  # minimax of 2^f on -1/2 … 1/2
    v = fused(v, f, f4(5.55073377e-2))
    v = fused(v, f, f4(0.240222421))
    v = fused(v, f, f4(0.693146978))
    v = fused(v, f, ONE)
    return moved(v, bits_of(whole))


@helper
def _place(row, rows, steps):
    """Where a row begins: rows counts them along each of three dimensions."""
    n, last = row // rows[2], row % rows[2]
    return n // rows[1] * steps[0] + n % rows[1] * steps[1] + last * steps[2]


@jit
def _gelu(x, rows, steps, first, end, width, out):
    """x·sigmoid(2u), see _LINEAR."""
    for row in range(first, end):
        at = _place(row, rows, steps)
        for i in range(0, width, LANES):
            v = load(x, at + i)
            t = v * fused(v * v, splat(_CUBIC), _LINEAR)
            put(out, row * width + i, select(t < _MOST, v / (power_of_2(t) + ONE), v * ZERO))


@jit
def _rms_norm(x, rows, steps, first, end, width, weight, eps, out):
    lanes = aligned(LANES)
    for row in range(first, end):
        at = _place(row, rows, steps)
        squares = splat(ZERO)
        for i in range(0, width, LANES):
            v = load(x, at + i)
            squares = fused(v, v, squares)
        factor = ONE / np.sqrt(sum_of_lanes(squares, lanes) / f4(width) + eps)
        for i in range(0, width, LANES):
            put(out, row * width + i, load(x, at + i) * factor * load(weight, i))


def _by_rows(function, x: Tensor, *told) -> Tensor:
    """x (…, width) float32 of any strides but 1 for a row's numbers, of up to four dimensions; the
    width in whole sixteens -> its contiguous like.
    """
    more, width = 4 - x.dim(), x.shape[-1]
    rows, steps = (1,) * more + tuple(x.shape[:-1]), (0,) * more + x.stride()[:-1]
    reach = sum((n - 1) * step for n, step in zip(rows, steps, strict=True)) + width
    flat = x.detach().as_strided((reach,), (1,)).numpy()
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    target = writable(out)

    def work(first: int, end: int) -> None:
        function(flat, rows, steps, first, end, width, *told, target)

    in_threads(work, x.numel() // width, width)
    return out


def gelu(x: Tensor) -> Tensor:
    return _by_rows(_gelu, x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight (width,) float32."""
    return _by_rows(_rms_norm, x, weight.detach().contiguous().numpy(), f4(eps))
