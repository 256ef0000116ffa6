"""GELU and RMS norm on CPUs, in float32, in one pass over memory: torch takes a slow hyperbolic
tangent for the one and five passes for the other.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .numba_bytes import put
from .numba_dequant import streams
from .numba_jit import ONE, ZERO, f4, jit
from .numba_memory import aligned, load, sum_of_lanes
from .numba_native import address, floats_at, in_parts, ints_at, reader_of
from .numba_vector import LANES, bits_of, fused, helper, moved, select, splat

_LEAST, _MOST = f4(-125.0), f4(125.0)  # exponents
_PART = 2**15  # numbers: 128 KiB
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


class _Told(NamedTuple):
    """What the threads are told, see `_by_rows`; names of tensors are addresses."""

    x: int
    out: int
    streamed: int  # whether `out` is to be written past the cache
    weight: int
    eps: float
    reach: int  # numbers of x, those between rows included
    numbers: int
    width: int
    rows_1: int  # of the second and the third of three dimensions
    rows_2: int
    step_0: int  # from row to row, along each of them
    step_1: int
    step_2: int


_told = reader_of(_Told)


@helper
def _place(t, row):
    """Where a row of x begins."""
    n, last = row // t.rows_2, row % t.rows_2
    return n // t.rows_1 * t.step_0 + n % t.rows_1 * t.step_1 + last * t.step_2


@helper
def _gelu_into(t, first, end, out):
    """x·sigmoid(2u), see _LINEAR."""
    x = floats_at(t.x, t.reach)
    for row in range(first, end):
        at = _place(t, row)
        for i in range(0, t.width, LANES):
            v = load(x, at + i)
            p = v * fused(v * v, splat(_CUBIC), _LINEAR)
            put(out, row * t.width + i, select(p < _MOST, v / (power_of_2(p) + ONE), v * ZERO))


@jit
def _gelu(told, first, end):
    t = _told(told)
    if t.streamed:
        _gelu_into(t, first, end, ints_at(t.out, t.numbers))
    else:
        _gelu_into(t, first, end, floats_at(t.out, t.numbers))


@helper
def _rms_norm_into(t, first, end, out):
    x, weight, lanes = floats_at(t.x, t.reach), floats_at(t.weight, t.width), aligned(LANES)
    for row in range(first, end):
        at = _place(t, row)
        squares = splat(ZERO)
        for i in range(0, t.width, LANES):
            v = load(x, at + i)
            squares = fused(v, v, squares)
        factor = ONE / np.sqrt(sum_of_lanes(squares, lanes) / f4(t.width) + f4(t.eps))
        for i in range(0, t.width, LANES):
            put(out, row * t.width + i, load(x, at + i) * factor * load(weight, i))


@jit
def _rms_norm(told, first, end):
    t = _told(told)
    if t.streamed:
        _rms_norm_into(t, first, end, ints_at(t.out, t.numbers))
    else:
        _rms_norm_into(t, first, end, floats_at(t.out, t.numbers))


def _by_rows(work, x: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """x (…, width) float32 of any strides but 1 for a row's numbers, of up to four dimensions; the
    width in whole sixteens -> its contiguous like.
    """
    more, width = 4 - x.dim(), x.shape[-1]
    rows, steps = (1,) * more + tuple(x.shape[:-1]), (0,) * more + x.stride()[:-1]
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    told = _Told(
        address(x.detach(), torch.float32),
        out.data_ptr(),
        streams(out),
        0 if weight is None else address(weight.detach(), torch.float32),
        eps,
        sum((n - 1) * step for n, step in zip(rows, steps, strict=True)) + width,
        x.numel(),
        width,
        *rows[1:],
        *steps,
    )
    in_parts(work, told, x.numel() // width, max(1, _PART // width), width)
    return out


def gelu(x: Tensor) -> Tensor:
    return _by_rows(_gelu, x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight (width,) float32."""
    return _by_rows(_rms_norm, x, weight.contiguous(), eps)
