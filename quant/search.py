"""ggml's searches for the scale, or scale and minimum, that lose least on a group of weights.

Source: ggml-quants.c, functions of the same names. Here `x` is (size, n): the index inside a group
comes first, since sums run over it in ggml's order, and n groups are searched side by side.
`weights`, shaped as `x`, say how much each squared error counts. Codes come as (size, n) int32,
scales as (n,) float32. A product in the comments' order is a product rounded in that order.
"""

import numpy as np
import torch
from torch import Tensor

from .rounding import nearest_int, ordered_sum, quotient, signed_amax, smallest

MAX_EPS = 1e-15  # GROUP_MAX_EPS: a group smaller than this is all zero
_ROUNDS = 5  # of coordinate descent


def make_qx_quants(x: Tensor, nmax: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """scale, codes 0 … 2·nmax - 1 with x ≈ scale·(code - nmax); weights x² if None.

    The largest weight is laid on -nmax, then on eighteen values around it. (rmse_type = 1)
    """
    largest = signed_amax(x)
    wx, w = (x * x * x, x * x) if weights is None else (weights * x, weights)

    def attempt(steps: float) -> tuple[Tensor, Tensor, Tensor]:
        codes = nearest_int(quotient(-steps, largest) * x).clamp_(-nmax, nmax - 1)
        value = codes.float()
        return codes, ordered_sum(wx * value), ordered_sum(w * value * value)

    codes, sumlx, suml2 = attempt(nmax)
    scale = torch.where(suml2 != 0, sumlx / suml2, 0.0)
    best = scale * sumlx
    for step in (*range(-9, 0), *range(1, 10)):
        tried, sumlx, suml2 = attempt(float(nmax + np.float32(0.1) * np.float32(step)))
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        codes = torch.where(better, tried, codes)
        scale = torch.where(better, sumlx / suml2, scale)
        best = torch.where(better, scale * sumlx, best)
    zero = largest.abs() < MAX_EPS
    return scale.masked_fill_(zero, 0.0), (codes + nmax).masked_fill_(zero, 0)


def make_q3_quants(x: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """As `make_qx_quants` with weights x², but by moving one code at a time. (do_rmse)"""
    largest = signed_amax(x)
    w = x * x
    wx = w * x
    codes = nearest_int(quotient(-nmax, largest) * x).clamp_(-nmax, nmax - 1)
    value = codes.float()
    sumlx, suml2 = ordered_sum(wx * value), ordered_sum(w * value * value)
    for _ in range(_ROUNDS):
        before = codes.clone()
        for i, code in enumerate(codes):
            value = code.float()
            slx, sl2 = sumlx - wx[i] * value, suml2 - w[i] * value * value
            new = nearest_int(x[i] * sl2 / slx).clamp_(-nmax, nmax - 1)
            valid = (slx > 0) & (new != code)
            slx, sl2 = slx + wx[i] * new, sl2 + w[i] * new * new
            better = valid & (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            codes[i] = torch.where(better, new, code)
            sumlx, suml2 = torch.where(better, slx, sumlx), torch.where(better, sl2, suml2)
        if torch.equal(before, codes):
            break
    zero = largest.abs() < MAX_EPS
    scale = torch.where(suml2 > 0, sumlx / suml2, 0.0)
    return scale.masked_fill_(zero, 0.0), (codes + nmax).masked_fill_(zero, 0)


def make_qkx_quants(
    x: Tensor,
    nmax: int,
    weights: Tensor,
    grid: tuple[float, float, int],
    use_mad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """scale, minimum (as a number to subtract), codes 0 … nmax: x ≈ scale·code - minimum.

    grid: rmin, rdelta, nstep: codes are tried for nmax + rmin + rdelta·step steps between the best
    minimum so far and the largest x, and both fitted to them by weighted least squares. use_mad:
    judge by the absolute error. (make_qkx2_quants, and make_qkx3_quants, the same with weights)
    """
    rmin, rdelta, nstep = np.float32(grid[0]), np.float32(grid[1]), grid[2]
    low, high = smallest(x), x.amax(0)
    low = torch.where(low > 0, 0.0, low)
    flat, lowest = high == low, low
    sum_w, sum_x = ordered_sum(weights), ordered_sum(weights * x)

    def codes_for(steps: float) -> Tensor:
        return nearest_int(quotient(steps, high - low) * (x - low)).clamp_(0, nmax)

    def error(scale: Tensor, low: Tensor, value: Tensor) -> Tensor:
        diff = scale * value + low - x
        return ordered_sum(weights * (diff.abs() if use_mad else diff * diff))

    codes = codes_for(nmax)
    scale = 1.0 / quotient(nmax, high - low)
    best = error(scale, low, codes.float())
    for step in range(nstep + 1):
        tried = codes_for(float(rmin + rdelta * np.float32(step) + np.float32(nmax)))
        value = tried.float()
        wl = weights * value
        sum_l, sum_l2, sum_xl = ordered_sum(wl), ordered_sum(wl * value), ordered_sum(wl * x)
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        above = new_low > 0
        new_scale = torch.where(above, sum_xl / sum_l2, new_scale)
        new_low = torch.where(above, 0.0, new_low)
        new_error = error(new_scale, new_low, value)
        better = (det > 0) & (new_error < best)
        codes, best = torch.where(better, tried, codes), torch.where(better, new_error, best)
        scale, low = torch.where(better, new_scale, scale), torch.where(better, new_low, low)
    minimum = -torch.where(flat, lowest, low)
    return scale.masked_fill_(flat, 0.0), minimum, codes.masked_fill_(flat, 0)


def make_qp_quants(x: Tensor, nmax: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """scale, codes 0 … nmax with x ≈ scale·code, for x ≥ 0: the scales of a super-block.

    Codes are bytes in ggml, so those below zero, which an odd `x` makes, wrap around.
    """
    vmax = torch.zeros_like(x[0])
    for value in x:
        vmax = torch.where(vmax > value, vmax, value)

    def error(scale: Tensor, codes: Tensor) -> Tensor:
        diff = x - scale * codes
        return ordered_sum(weights * diff * diff)

    inv_scale = quotient(nmax, vmax)
    best = error(1.0 / inv_scale, nearest_int(inv_scale * x) & 0xFF)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = quotient(float(np.float32(0.1) * np.float32(step) + np.float32(nmax)), vmax)
        new_error = error(1.0 / tried, nearest_int(tried * x).clamp_(max=nmax))
        better = new_error < best
        best, inv_scale = (
            torch.where(better, new_error, best),
            torch.where(better, tried, inv_scale),
        )
    codes = nearest_int(inv_scale * x).clamp_(max=nmax)
    scale, codes = _descend(x, nmax, weights, codes)
    zero = vmax < MAX_EPS
    return scale.masked_fill_(zero, 0.0), codes.masked_fill_(zero, 0)


def _descend(x: Tensor, nmax: int, w: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """scale, codes: each code in turn moved to where it fits best, until none moves."""
    wx = w * x
    sumlx, suml2 = ordered_sum(wx * codes), ordered_sum(w * codes * codes)
    codes = codes & 0xFF
    for _ in range(_ROUNDS):
        before = codes.clone()
        for i, code in enumerate(codes):
            slx, sl2 = sumlx - wx[i] * code, suml2 - w[i] * code * code
            new = nearest_int(x[i] * sl2 / slx).clamp_(max=nmax)
            valid = (slx > 0) & (sl2 > 0) & (new != code)
            slx, sl2 = slx + wx[i] * new, sl2 + w[i] * new * new
            better = valid & (slx * slx * suml2 > sumlx * sumlx * sl2)
            codes[i] = torch.where(better, new & 0xFF, code)
            sumlx, suml2 = torch.where(better, slx, sumlx), torch.where(better, sl2, suml2)
        if torch.equal(before, codes):
            break
    return torch.where(suml2 > 0, sumlx / suml2, 0.0), codes
