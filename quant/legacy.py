"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and BF16: 32 weights, one half-precision scale, maybe a minimum.

Source: ggml `dequantize_row_q4_0` … `dequantize_row_q8_0`; gguf-py `quants.py`. Nibbles: byte i
holds weight i in its low half and weight i + 16 in its high half.
"""

import torch
from torch import Tensor

from .bits import half, planes


def dequantize_q4_0(blocks: Tensor) -> Tensor:
    """(n, 18) uint8 -> (n, 32) float32.   d: f16 | qs: 16 bytes.   w = d·(q - 8)"""
    q = planes(blocks[:, 2:], 4, dim=1).view(torch.int8).sub_(8)
    return q.flatten(1).float().mul_(half(blocks, 0))


def dequantize_q4_1(blocks: Tensor) -> Tensor:
    """(n, 20) uint8 -> (n, 32) float32.   d: f16 | m: f16 | qs: 16 bytes.   w = d·q + m"""
    q = planes(blocks[:, 4:], 4, dim=1)
    return q.flatten(1).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def _q5(qh: Tensor, qs: Tensor) -> Tensor:
    """(n, 32) uint8 in 0..31: bit 4 of weight i is bit i of the four bytes `qh`."""
    high = planes(qh, 1).flatten(1)
    return planes(qs, 4, dim=1).flatten(1).bitwise_or_(high << 4)


def dequantize_q5_0(blocks: Tensor) -> Tensor:
    """(n, 22) uint8 -> (n, 32) float32.   d: f16 | qh: 4 | qs: 16 bytes.   w = d·(q - 16)"""
    q = _q5(blocks[:, 2:6], blocks[:, 6:]).view(torch.int8).sub_(16)
    return q.float().mul_(half(blocks, 0))


def dequantize_q5_1(blocks: Tensor) -> Tensor:
    """(n, 24) uint8 -> (n, 32) float32.   d: f16 | m: f16 | qh: 4 | qs: 16 bytes.   w = d·q + m"""
    q = _q5(blocks[:, 4:8], blocks[:, 8:])
    return q.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def dequantize_q8_0(blocks: Tensor) -> Tensor:
    """(n, 34) uint8 -> (n, 32) float32.   d: f16 | qs: 32 int8.   w = d·q"""
    return blocks[:, 2:].view(torch.int8).float().mul_(half(blocks, 0))


def dequantize_bf16(blocks: Tensor) -> Tensor:
    """(n, 2) uint8 -> (n, 1) float32: the upper half of the float's bits."""
    return blocks.contiguous().view(torch.bfloat16).float()
