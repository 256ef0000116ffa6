"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 weights, one half-precision scale, maybe a minimum.

Source: ggml `dequantize_row_q4_0` … `dequantize_row_q8_0`, `quantize_q4_0` … `quantize_q8_0`;
gguf-py `quants.py`. The quantisers' `weights`, shaped as `x`, say how much each error counts.
"""

import torch
from torch import Tensor

from . import tables
from .bits import half, pack_planes
from .rounding import (
    divide,
    half_bytes,
    reciprocal,
    round_half_away,
    signed_amax,
    smallest,
    truncate,
)
from .search import make_qkx_quants, make_qx_quants


def _nibbles(blocks: Tensor, start: int) -> Tensor:
    """(n, 32) uint8: byte i from `start` holds weight i in its low and i + 16 in its high half.

    Whole blocks are masked before the slice: a loop over runs of 16 bytes is ten times slower.
    """
    return torch.cat(((blocks & 0x0F)[:, start:], (blocks >> 4)[:, start:]), 1)


def _five_bits(blocks: Tensor, start: int) -> Tensor:
    """(n, 32) uint8 in 0..31: bit i of the four bytes from `start` is bit 4 of weight i."""
    high = tables.look_up(tables.bits(16, blocks.device), blocks[:, start : start + 4])
    return _nibbles(blocks, start + 4).bitwise_or_(high.view(torch.uint8).flatten(1))


def dequantize_q4_0(blocks: Tensor) -> Tensor:
    """(n, 18) uint8 -> (n, 32) float32.   d: f16 | qs: 16 bytes.   w = d·(q - 8)"""
    q = _nibbles(blocks, 2).view(torch.int8).sub_(8)
    return q.float().mul_(half(blocks, 0))


def dequantize_q4_1(blocks: Tensor) -> Tensor:
    """(n, 20) uint8 -> (n, 32) float32.   d: f16 | m: f16 | qs: 16 bytes.   w = d·q + m"""
    return _nibbles(blocks, 4).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def dequantize_q5_0(blocks: Tensor) -> Tensor:
    """(n, 22) uint8 -> (n, 32) float32.   d: f16 | qh: 4 | qs: 16 bytes.   w = d·(q - 16)"""
    q = _five_bits(blocks, 2).view(torch.int8).sub_(16)
    return q.float().mul_(half(blocks, 0))


def dequantize_q5_1(blocks: Tensor) -> Tensor:
    """(n, 24) uint8 -> (n, 32) float32.   d: f16 | m: f16 | qh: 4 | qs: 16 bytes.   w = d·q + m"""
    return _five_bits(blocks, 4).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def dequantize_q8_0(blocks: Tensor) -> Tensor:
    """(n, 34) uint8 -> (n, 32) float32.   d: f16 | qs: 32 int8.   w = d·q"""
    return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))


def _pack_nibbles(q: Tensor) -> Tensor:
    """(n, 32) int32 -> (n, 16) uint8: the inverse of `_nibbles`."""
    q = (q & 0x0F).to(torch.uint8)
    return q[:, :16] | (q[:, 16:] << 4)


def _pack_five_bits(q: Tensor) -> Tensor:
    """(n, 32) int32 -> (n, 20) uint8: the inverse of `_five_bits`."""
    high = pack_planes(((q >> 4) & 1).view(-1, 4, 8), 1, dim=2)
    return torch.cat((high, _pack_nibbles(q)), 1)


def _symmetric(x: Tensor, nmax: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """d as (n, 2) bytes and q (n, 32) int32 in 0 … 2·nmax - 1, with w = d·(q - nmax).

    Without weights the weight of largest magnitude becomes q = 0.
    """
    if weights is not None:
        d, q = make_qx_quants(x.t().contiguous(), nmax, weights.t().contiguous())
        return half_bytes(d), q.t()
    d = divide(signed_amax(x.t()), -nmax)
    q = truncate(x * reciprocal(d).unsqueeze(1) + (nmax + 0.5)).clamp_(max=2 * nmax - 1)
    return half_bytes(d), q


def _with_minimum(x: Tensor, nmax: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """d and m as (n, 4) bytes and q (n, 32) int32 in 0 … nmax, with w = d·q + m."""
    if weights is not None:
        grid = (-0.9, 0.05, 36)
        d, low, q = make_qkx_quants(x.t().contiguous(), nmax, weights.t().contiguous(), grid)
        return torch.cat((half_bytes(d), half_bytes(-low)), 1), q.t()
    vmin = smallest(x.t())
    d = divide(x.amax(1) - vmin, nmax)
    q = truncate((x - vmin.unsqueeze(1)) * reciprocal(d).unsqueeze(1) + 0.5)
    return torch.cat((half_bytes(d), half_bytes(vmin)), 1), q.clamp_(max=nmax)


def quantize_q4_0(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, 32) float32 -> (n, 18) uint8."""
    d, q = _symmetric(x, 8, weights)
    return torch.cat((d, _pack_nibbles(q)), 1)


def quantize_q4_1(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, 32) float32 -> (n, 20) uint8."""
    dm, q = _with_minimum(x, 15, weights)
    return torch.cat((dm, _pack_nibbles(q)), 1)


def quantize_q5_0(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, 32) float32 -> (n, 22) uint8."""
    d, q = _symmetric(x, 16, weights)
    return torch.cat((d, _pack_five_bits(q)), 1)


def quantize_q5_1(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, 32) float32 -> (n, 24) uint8."""
    dm, q = _with_minimum(x, 31, weights)
    return torch.cat((dm, _pack_five_bits(q)), 1)


def quantize_q8_0(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, 32) float32 -> (n, 34) uint8. `weights` is passed over, as in ggml."""
    d = divide(x.abs().amax(1), 127.0)
    q = round_half_away(x * reciprocal(d).unsqueeze(1))
    return torch.cat((half_bytes(d), (q & 0xFF).to(torch.uint8)), 1)
