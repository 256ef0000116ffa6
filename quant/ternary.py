"""TQ1_0 and TQ2_0: weights of -d, 0 or d, in super-blocks of 256.

Source: ggml `dequantize_row_tq1_0`, `dequantize_row_tq2_0`, `quantize_row_tq1_0_ref`,
`quantize_row_tq2_0_ref`; gguf-py `quants.py`. They are for weights trained to be ternary.
"""

import torch
from torch import Tensor

from .bits import half, pack_planes, planes
from .rounding import half_bytes, reciprocal, round_half_away

_POWERS_OF_3 = (1, 3, 9, 27, 81)


def _trits(x: Tensor, count: int) -> Tensor:
    """(n, w) uint8 -> (n, count·w) uint8: digit k of each byte, still as a fraction of 256.

    A byte is a fraction f/256 in base 3; multiplying by 3^k modulo 256 drops its first k digits.
    """
    return torch.stack([x * power for power in _POWERS_OF_3[:count]], 1).flatten(1)


def dequantize_tq1_0(blocks: Tensor) -> Tensor:
    """(n, 54) uint8 -> (n, 256) float32.   w = d·(trit - 1)

    qs: 32 + 16 bytes of five trits | qh: 4 bytes of four trits | d: f16
    """
    fractions = torch.cat(
        (_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4)), 1
    )
    q = fractions.to(torch.int16).mul_(3).bitwise_right_shift_(8).sub_(1)
    return q.float().mul_(half(blocks, 52))


def dequantize_tq2_0(blocks: Tensor) -> Tensor:
    """(n, 66) uint8 -> (n, 256) float32.   qs: 64 bytes | d: f16.   w = d·(q - 1)"""
    q = planes(blocks[:, :64].reshape(-1, 2, 32), 2, dim=2).view(torch.int8).sub_(1)
    return q.flatten(1).float().mul_(half(blocks, 64))


def _nearest_trits(x: Tensor) -> tuple[Tensor, Tensor]:
    """d (n, 2) bytes, the largest magnitude, and trits (n, 256) int32: round(x/d) + 1."""
    d = x.abs().amax(1)
    return half_bytes(d), round_half_away(x * reciprocal(d).unsqueeze(1)) + 1


def _pack_trits(q: Tensor) -> Tensor:
    """(n, up to 5, w) trits -> (n, w) bytes: the base-3 fraction of five digits, rounded up."""
    number = sum(q[:, k] * _POWERS_OF_3[4 - k] for k in range(q.shape[1]))
    return ((number * 256 + 242) // 243).to(torch.uint8)


def quantize_tq1_0(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, 256) float32 -> (n, 54) uint8. `weights` is passed over, as in ggml."""
    d, q = _nearest_trits(x)
    parts = (q[:, :160].view(-1, 5, 32), q[:, 160:240].view(-1, 5, 16), q[:, 240:].view(-1, 4, 4))
    return torch.cat((*map(_pack_trits, parts), d), 1)


def quantize_tq2_0(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, 256) float32 -> (n, 66) uint8. `weights` is passed over, as in ggml."""
    d, q = _nearest_trits(x)
    return torch.cat((pack_planes((q & 3).view(-1, 2, 4, 32), 2, dim=2).flatten(1), d), 1)
