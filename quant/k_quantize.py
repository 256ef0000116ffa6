"""Writing the K-quants: a scale (and minimum) for each sub-block, these quantised, then the codes.

Source: ggml `quantize_q2_K` … `quantize_q6_K`: without importance `quantize_row_…_ref`, with it
`quantize_row_…_impl`, which are two algorithms. Layouts stand beside the readers in `k.py`.
`importance` is (n, 256), as `x`, or None. Sub-blocks go through the searches as columns.
"""

import torch
from torch import Tensor

from .bits import half, pack_planes
from .k import scale_min
from .rounding import (
    amax_above_zero,
    divide,
    half_bytes,
    nearest_int,
    ordered_sum,
    quotient,
    signed_amax,
    square_root,
)
from .search import MAX_EPS, make_q3_quants, make_qkx_quants, make_qp_quants, make_qx_quants

_IMPORTANCE_GRID = (-0.9, 0.05, 36)  # the search for scale and minimum, for all types


def _columns(x: Tensor, size: int) -> Tensor:
    """(n, 256) -> (size, n·256/size): a sub-block is a column."""
    return x.reshape(-1, size).t().contiguous()


def _weights(x: Tensor, importance: Tensor, factor: float, size: int) -> tuple[Tensor, Tensor]:
    """importance·sqrt(sigma2 + x²) as columns, and their sums (n, sub-blocks).

    sigma2 = factor · mean square of the super-block.
    """
    squares = x * x
    sigma2 = factor * ordered_sum(squares.t()) / 256
    weights = _columns(importance * square_root(sigma2.unsqueeze(1) + squares), size)
    return weights, ordered_sum(weights).view(len(x), -1)


def _requantize(
    x: Tensor, d: Tensor, dm: Tensor | None, codes: Tensor, low: int, high: int
) -> Tensor:
    """(n, 256) int32: codes for the quantised scales `d` and minima `dm` (n, sub-blocks).

    Where d is zero the searched `codes` (size, columns) stay.
    """
    n, sub_blocks = d.shape
    x = x.view(n, sub_blocks, -1)
    if dm is not None:
        x = x + dm.unsqueeze(-1)
    new = nearest_int(x / d.unsqueeze(-1)).clamp_(low, high) - low
    searched = codes.t().reshape(new.shape)
    return torch.where(d.unsqueeze(-1) == 0, searched, new).reshape(n, 256)


def _pack_2_bits(q: Tensor) -> Tensor:
    """(n, 256) -> (n, 64): four runs of 32 in a byte, for each half."""
    return pack_planes(q.view(-1, 2, 4, 32), 2, dim=2).flatten(1)


def _bytes(x: Tensor) -> Tensor:
    """int32 -> uint8, modulo 256."""
    return (x & 0xFF).to(torch.uint8)


def quantize_q2_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(n, 256) float32 -> (n, 84) uint8."""
    n, columns = len(x), _columns(x, 16)
    if importance is None:
        fit = make_qkx_quants(columns, 3, columns.abs(), (-0.5, 0.1, 15), use_mad=True)
        scales, mins, codes = fit[0].view(n, 16), fit[1].view(n, 16), fit[2]
        d, sc = _fraction_of_largest(scales, 15)
        dmin, m = _fraction_of_largest(mins, 15)
    else:
        weights, sums = _weights(x, importance, 1.0, 16)
        scales, mins, codes = make_qkx_quants(columns, 3, weights, _IMPORTANCE_GRID)
        d, sc = _searched(scales.view(n, 16), 15, sums)
        dmin, m = _searched(mins.view(n, 16), 15, sums)
    scale_bytes = _bytes(sc | (m << 4))
    d, dmin = half_bytes(d), half_bytes(dmin)
    dl = half(d, 0) * (scale_bytes & 0x0F).float()
    ml = half(dmin, 0) * (scale_bytes >> 4).float()
    q = _requantize(x, dl, ml, codes, 0, 3)
    return torch.cat((scale_bytes, _pack_2_bits(q), d, dmin), 1)


def _fraction_of_largest(values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """d (n,) and codes (n, w) int32 with values ≈ d·code, the largest value at `steps`."""
    largest = amax_above_zero(values.t())
    inv = torch.where(largest > 0, quotient(steps, largest), 0.0)
    codes = nearest_int(inv.unsqueeze(1) * values)
    return divide(largest, steps), codes.masked_fill_((largest <= 0).unsqueeze(1), 0)


def _searched(values: Tensor, steps: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As `_fraction_of_largest`, but with the least weighted error."""
    d, codes = make_qp_quants(values.t().contiguous(), steps, weights.t().contiguous())
    return d, codes.t()


def quantize_q3_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(n, 256) float32 -> (n, 110) uint8."""
    n, columns = len(x), _columns(x, 16)
    if importance is None:
        scales, codes = make_q3_quants(columns, 4)
        scales = scales.view(n, 16)
        largest = signed_amax(scales.t())
        inv = quotient(-32.0, largest)
        sc = _bytes(nearest_int(inv.unsqueeze(1) * scales)).view(torch.int8).int()
        sc = (sc.clamp_(-32, 31) + 32).masked_fill_((largest == 0).unsqueeze(1), 0)
        d = torch.where(largest == 0, 0.0, 1.0 / inv)
    else:
        weights, sums = _weights(x, importance, 2.0, 16)
        scales, codes = make_qx_quants(columns, 4, weights)
        d, sc = make_qx_quants(scales.view(n, 16).t().contiguous(), 32, sums.t().contiguous())
        sc = sc.t()
    return write_q3_k(x, d, sc, codes)


def write_q3_k(x: Tensor, d: Tensor, sc: Tensor, codes: Tensor) -> Tensor:
    """(n, 110) uint8: x in d·(sc - 32), sc (n, 16) int32; for `codes` see `_requantize`."""
    n, d = len(x), half_bytes(d)
    q = _requantize(x, half(d, 0) * (sc - 32), None, codes, -4, 3)
    high = pack_planes((q >> 2).view(n, 8, 32), 1, dim=1)
    return torch.cat((high, _pack_2_bits(q & 3), _pack_q3_scales(sc), d), 1)


def _pack_q3_scales(sc: Tensor) -> Tensor:
    """(n, 16) int32 in 0 … 63 -> (n, 12): the inverse of `_q3_scales`."""
    low = pack_planes((sc & 0x0F).view(-1, 2, 8), 4, dim=1)
    return torch.cat((low, pack_planes((sc >> 4).view(-1, 4, 4), 2, dim=1)), 1)


def _search_ranges(
    x: Tensor, importance: Tensor | None, nmax: int, grid: tuple[float, float, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, dmin (n,), their multiples sc, m (n, 8), and the codes, of Q4_K and Q5_K."""
    n, columns = len(x), _columns(x, 32)
    if importance is None:
        weights = square_root(divide(ordered_sum(columns * columns), 32)) + columns.abs()
        scales, mins, codes = make_qkx_quants(columns, nmax, weights, grid)
        d, sc = _fraction_of_largest(scales.view(n, 8), 63)
        dmin, m = _fraction_of_largest(mins.view(n, 8), 63)
        sc, m = (sc & 0xFF).clamp_(max=63), (m & 0xFF).clamp_(max=63)
    else:
        weights, sums = _weights(x, importance, 2.0, 32)
        scales, mins, codes = make_qkx_quants(columns, nmax, weights, _IMPORTANCE_GRID)
        d, sc = _searched(scales.view(n, 8), 63, sums)
        dmin, m = _searched(mins.view(n, 8), 63, sums)
        if nmax == 31:  # Q5_K alone
            sc, m = sc.clamp(max=63), m.clamp(max=63)
    return d, dmin, sc, m, codes


def _pack_scale_min(sc: Tensor, m: Tensor) -> Tensor:
    """Two (n, 8) int32 -> (n, 12): the inverse of `scale_min`."""
    first = sc[:, :4] | ((sc[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    low = (sc[:, 4:] & 0x0F) | ((m[:, 4:] & 0x0F) << 4)
    return _bytes(torch.cat((first, second, low), 1))


def _write_ranges(
    x: Tensor, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor, codes: Tensor, nmax: int
) -> tuple[Tensor, Tensor]:
    """The 16 bytes that Q4_K and Q5_K begin with, and the codes (n, 256) int32."""
    head = torch.cat((half_bytes(d), half_bytes(dmin), _pack_scale_min(sc, m)), 1)
    sc, m = scale_min(head)
    return head, _requantize(x, half(head, 0) * sc, half(head, 2) * m, codes, 0, nmax)


def quantize_q4_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(n, 256) float32 -> (n, 144) uint8."""
    return write_q4_k(x, *_search_ranges(x, importance, 15, (-1.0, 0.1, 20)))


def write_q4_k(x: Tensor, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor, codes: Tensor) -> Tensor:
    """(n, 144) uint8: x in d·sc and dmin·m, sc and m (n, 8) int32; codes: see `_requantize`."""
    head, q = _write_ranges(x, d, dmin, sc, m, codes, 15)
    return torch.cat((head, pack_planes(q.view(-1, 4, 2, 32), 4, dim=2).flatten(1)), 1)


def quantize_q5_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(n, 256) float32 -> (n, 176) uint8."""
    return write_q5_k(x, *_search_ranges(x, importance, 31, (-0.5, 0.1, 15)))


def write_q5_k(x: Tensor, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor, codes: Tensor) -> Tensor:
    """(n, 176) uint8, as `write_q4_k`."""
    head, q = _write_ranges(x, d, dmin, sc, m, codes, 31)
    high = pack_planes((q >> 4).view(-1, 8, 32), 1, dim=1)
    low = pack_planes((q & 0x0F).view(-1, 4, 2, 32), 4, dim=2).flatten(1)
    return torch.cat((head, high, low), 1)


def quantize_q6_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(n, 256) float32 -> (n, 210) uint8. The importance alone weighs the errors, not sigma2."""
    n, columns = len(x), _columns(x, 16)
    weights = None if importance is None else _columns(importance, 16)
    scales, codes = make_qx_quants(columns, 32, weights)
    scales = scales.view(n, 16)
    largest = signed_amax(scales.t())
    inv = quotient(-128.0, largest)
    sc = nearest_int(inv.unsqueeze(1) * scales).clamp_(max=127)
    d = torch.where(largest.abs() < MAX_EPS, 0.0, 1.0 / inv)
    return write_q6_k(x, d, sc, codes)


def write_q6_k(x: Tensor, d: Tensor, sc: Tensor, codes: Tensor) -> Tensor:
    """(n, 210) uint8: x in d·sc, sc (n, 16) int32; zeros where d is; else as `write_q3_k`."""
    n, sc, zero = len(x), _bytes(sc), (d == 0).unsqueeze(1)
    d = half_bytes(d)
    q = _requantize(x, half(d, 0) * sc.view(torch.int8).float(), None, codes, -32, 31)
    low = pack_planes((q & 0x0F).view(n, 2, 2, 64), 4, dim=2).flatten(1)
    high = pack_planes((q >> 4).view(n, 2, 4, 32), 2, dim=2).flatten(1)
    return torch.cat((low, high, sc, d), 1).masked_fill_(zero, 0)
