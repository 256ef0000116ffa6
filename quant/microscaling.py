"""MXFP4 and NVFP4: four-bit floats (E2M1) with an eight-bit float scale.

Source: OCP Microscaling Formats 1.0; ggml `dequantize_row_mxfp4`, `dequantize_row_nvfp4`; gguf-py
`quants.py`. The tables hold twice the E2M1 values, to stay whole, so the scales hold a half.
"""

import torch
from torch import Tensor

from .rounding import divide, truncate
from .tables import look_up_nibbles, nibble_values


def e8m0_half(e: Tensor) -> Tensor:
    """float32 2^(e - 128); the two smallest are subnormal and so are made bit by bit."""
    e = e.int()
    return torch.where(e < 2, 0x00200000 << e, (e - 1) << 23).view(torch.float32)


def ue4m3_half(x: Tensor) -> Tensor:
    """float32: half the unsigned E4M3 value (bias 7); bit 7 is ignored, 0x7F (NaN) reads as 0."""
    exponent, mantissa = (x.int() >> 3) & 0x0F, x.int() & 0x07
    normal = ((exponent + 119) << 23 | mantissa << 20).view(torch.float32)
    value = torch.where(exponent == 0, mantissa.float() * 2**-10, normal)
    return value.masked_fill_(x == 0x7F, 0.0)


def dequantize_mxfp4(blocks: Tensor) -> Tensor:
    """(n, 17) uint8 -> (n, 32) float32.   e: 1 byte | qs: 16 bytes.   w = 2^(e - 127)·e2m1[q]"""
    q = look_up_nibbles("MXFP4", blocks[:, 1:])
    return q.flatten(1).float().mul_(e8m0_half(blocks[:, :1]))


def dequantize_nvfp4(blocks: Tensor) -> Tensor:
    """(n, 36) uint8 -> (n, 64) float32.   d: 4 bytes | qs: 4 × 8 bytes, for sub-blocks of 16"""
    q = look_up_nibbles("NVFP4", blocks[:, 4:].reshape(-1, 4, 8)).view(-1, 4, 16)
    return q.float().mul_(ue4m3_half(blocks[:, :4]).unsqueeze(-1)).flatten(1)


def _nearest_value(x: Tensor, scale: Tensor) -> Tensor:
    """uint8, shaped as `x`: the first of the sixteen E2M1 values nearest to x / scale."""
    values, _ = nibble_values("MXFP4", x.device)
    q, best = torch.zeros_like(x, dtype=torch.uint8), x.abs()  # the first value is 0
    for i, value in enumerate(values[:16].tolist()):
        error = (value * scale - x).abs()
        nearer = error < best
        q, best = q.masked_fill_(nearer, i), torch.where(nearer, error, best)
    return q


def quantize_mxfp4(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, 32) float32 -> (n, 17) uint8. `weights` is passed over, as in ggml.

    The exponent is that of the largest weight's log2 in float32, which rounds up to a whole number
    just below a power of two; it wraps around below 2^-125, as ggml's byte does.
    """
    amax = x.abs().amax(1, keepdim=True)
    log2 = amax.double().log2().float().floor() + (127 - 2)
    e = torch.where(amax > 0, truncate(log2) & 0xFF, 0).to(torch.uint8)
    q = _nearest_value(x, e8m0_half(e))
    return torch.cat((e, q[:, :16] | (q[:, 16:] << 4)), 1)


def _to_ue4m3(x: Tensor) -> Tensor:
    """uint8: x ≥ 0 as unsigned E4M3, half upwards. (ggml_fp32_to_ue4m3)

    ggml takes all with the highest exponent, from 248 on, to 448.
    """
    word = x.contiguous().view(torch.int32)
    exponent = (word >> 23) - 127 + 7
    normal = (exponent << 3 | ((word >> 20) & 7)) + ((word >> 19) & 1)  # carries into the exponent
    subnormal = truncate(x * 512 + 0.5).clamp_(max=7)
    code = torch.where(exponent <= 0, subnormal, normal)
    return torch.where(code >= 15 << 3, 0x7E, code).to(torch.uint8)


def quantize_nvfp4(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, 64) float32 -> (n, 36) uint8. `weights` is passed over, as in ggml."""
    x = x.reshape(-1, 4, 16)
    d = _to_ue4m3(divide(x.abs().amax(2), 6.0))
    q = _nearest_value(x, ue4m3_half(d).unsqueeze(2))
    return torch.cat((d, (q[..., :8] | (q[..., 8:] << 4)).flatten(1)), 1)
