"""Writing IQ4_NL and IQ4_XS: sixteen uneven levels, and the scale that loses least on them.

Source: ggml `quantize_row_iq4_nl_impl` with ntry = 7. Layouts stand beside the readers in `iq.py`.
"""

import torch
from torch import Tensor

from .bits import pack_planes
from .rounding import (
    divide,
    half_bytes,
    nearest_int,
    ordered_sum,
    quotient,
    reciprocal,
    signed_amax,
    square_root,
)
from .search import MAX_EPS
from .tables import nibble_values

_TRIES = 7  # to either side
_LOWEST = -127  # the first level


def _levels(device: torch.device) -> Tensor:
    """(16,) float32, rising."""
    return nibble_values("IQ4_NL", device)[0][:16].float()


def _nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """int64: the index of the level nearest to x, the upper one of two. (best_index_int8)"""
    upper = torch.bucketize(x, levels, right=True).clamp_(1, 15)
    return torch.where(x - levels[upper - 1] < levels[upper] - x, upper - 1, upper)


def _search(x: Tensor, weights: Tensor) -> Tensor:
    """(n,) scales for x (32, n): the largest weight is tried on fifteen levels around the first."""
    levels, largest = _levels(x.device), signed_amax(x)

    def attempt(inv_d: Tensor) -> tuple[Tensor, Tensor]:
        q = levels[_nearest_level(inv_d * x, levels)]
        wq = weights * q
        return ordered_sum(wq * x), ordered_sum(wq * q)

    sumqx, sumq2 = attempt(1.0 / divide(-largest, _LOWEST))
    d = torch.where(sumq2 > 0, sumqx / sumq2, 0.0)
    best = d * sumqx
    for step in range(-_TRIES, _TRIES + 1):
        sumqx, sumq2 = attempt(quotient(step + _LOWEST, largest))
        better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
        d = torch.where(better, sumqx / sumq2, d)
        best = torch.where(better, d * sumqx, best)
    return d.masked_fill_(largest.abs() < MAX_EPS, 0.0)


def _scales(x: Tensor, importance: Tensor | None) -> Tensor:
    """(n, blocks of 32) float32 for x (n, 32 or 256), a super-block a row."""
    squares = x * x
    weights = squares
    if importance is not None:
        sigma2 = ordered_sum(squares.t()) * (2.0 / x.shape[1])
        weights = importance * square_root(sigma2.unsqueeze(1) + squares)
    columns = (x.reshape(-1, 32).t().contiguous(), weights.reshape(-1, 32).t().contiguous())
    return _search(*columns).view(len(x), -1)


def _pack(x: Tensor, inv_d: Tensor) -> Tensor:
    """(n, 32 or 256), inverse scales (n, blocks) -> (n, half as many) uint8."""
    scaled = inv_d.unsqueeze(-1) * x.view(len(x), -1, 32)
    q = _nearest_level(scaled, _levels(x.device))
    return pack_planes(q.view(len(x), -1, 2, 16), 4, dim=2).flatten(1)


def quantize_iq4_nl(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(n, 32) float32 -> (n, 18) uint8."""
    d = _scales(x, importance)
    return torch.cat((half_bytes(d), _pack(x, reciprocal(d))), 1)


def quantize_iq4_xs(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(n, 256) float32 -> (n, 136) uint8. The codes are for d before it is rounded to a half."""
    scales = _scales(x, importance)
    d = divide(-signed_amax(scales.t()), 32).unsqueeze(1)
    sc = nearest_int(reciprocal(d) * scales).clamp_(-32, 31)
    qs = _pack(x, reciprocal(d * sc))
    sc = sc + 32
    high = pack_planes((sc >> 4).view(-1, 2, 4), 2)
    low = pack_planes((sc & 0x0F).view(-1, 4, 2), 4)
    return torch.cat((half_bytes(d), high, low, qs), 1)
