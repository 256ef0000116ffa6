"""MXFP4 and NVFP4: four-bit floats (E2M1) with an eight-bit float scale.

Source: OCP Microscaling Formats 1.0; ggml `dequantize_row_mxfp4`, `dequantize_row_nvfp4`; gguf-py
`quants.py`. The tables hold twice the E2M1 values, to stay whole, so the scales hold a half.
"""

import torch
from torch import Tensor

from .tables import look_up_nibbles


def _e8m0_half(e: Tensor) -> Tensor:
    """float32 2^(e - 128); the two smallest are subnormal and so are made bit by bit."""
    e = e.int()
    return torch.where(e < 2, 0x00200000 << e, (e - 1) << 23).view(torch.float32)


def _ue4m3_half(x: Tensor) -> Tensor:
    """float32: half the unsigned E4M3 value (bias 7); bit 7 is ignored, 0x7F (NaN) reads as 0."""
    exponent, mantissa = (x.int() >> 3) & 0x0F, x.int() & 0x07
    normal = ((exponent + 119) << 23 | mantissa << 20).view(torch.float32)
    value = torch.where(exponent == 0, mantissa.float() * 2**-10, normal)
    return value.masked_fill_(x == 0x7F, 0.0)


def dequantize_mxfp4(blocks: Tensor) -> Tensor:
    """(n, 17) uint8 -> (n, 32) float32.   e: 1 byte | qs: 16 bytes.   w = 2^(e - 127)·e2m1[q]"""
    q = look_up_nibbles("MXFP4", blocks[:, 1:])
    return q.flatten(1).float().mul_(_e8m0_half(blocks[:, :1]))


def dequantize_nvfp4(blocks: Tensor) -> Tensor:
    """(n, 36) uint8 -> (n, 64) float32.   d: 4 bytes | qs: 4 × 8 bytes, for sub-blocks of 16"""
    q = look_up_nibbles("NVFP4", blocks[:, 4:].reshape(-1, 4, 8)).view(-1, 4, 16)
    return q.float().mul_(_ue4m3_half(blocks[:, :4]).unsqueeze(-1)).flatten(1)
