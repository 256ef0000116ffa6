"""The K-quants: super-blocks of 256 weights whose sub-blocks share quantised scales.

Source: ggml `dequantize_row_q2_K` … `dequantize_row_q6_K`; gguf-py `quants.py`. Products are taken
in ggml's order, since float32 results are to be equal bit for bit.
"""

import torch
from torch import Tensor

from .bits import half, planes, words

# The same mask for each of the four bytes of a word.
_LOW_4, _LOW_6, _BITS_4_5 = 0x0F0F0F0F, 0x3F3F3F3F, 0x30303030


def dequantize_q2_k(blocks: Tensor) -> Tensor:
    """(n, 84) uint8 -> (n, 256) float32.   w = d·sc·q - dmin·m, sub-blocks of 16

    scales: 16 bytes (low nibble sc, high nibble m) | qs: 64 bytes | d: f16 | dmin: f16
    """
    n = len(blocks)
    scales = blocks[:, :16]
    dl = half(blocks, 80) * (scales & 0x0F).float()
    ml = half(blocks, 82) * (scales >> 4).float()
    q = planes(blocks[:, 16:80].reshape(n, 2, 32), 2, dim=2)  # (n, 2, 4, 32)
    weights = q.view(n, 16, 16).float()
    return weights.mul_(dl.unsqueeze(-1)).sub_(ml.unsqueeze(-1)).view(n, 256)


def dequantize_q3_k(blocks: Tensor) -> Tensor:
    """(n, 110) uint8 -> (n, 256) float32.   w = d·(sc - 32)·(q - 4), sub-blocks of 16

    hmask: 32 bytes | qs: 64 bytes | scales: 12 bytes | d: f16. Bit 2 of q lies in hmask: bit j of
    its byte i belongs to weight 32j + i.
    """
    n = len(blocks)
    dl = half(blocks, 108) * _q3_scales(blocks).float()
    q = planes(blocks[:, 32:96].reshape(n, 2, 32), 2, dim=2).view(n, 256)
    high = planes(blocks[:, :32], 1, dim=1).view(n, 256)
    q = q.bitwise_or_(high.bitwise_left_shift_(2)).view(torch.int8).sub_(4)
    return q.view(n, 16, 16).float().mul_(dl.unsqueeze(-1)).view(n, 256)


def _q3_scales(blocks: Tensor) -> Tensor:
    """(n, 16) int8: the six-bit scales of Q3_K less 32, unpacked four in a word as ggml's C does.

    bytes 96..103   upper nibble: low bits of scales 8..15; lower nibble: those of 0..7
    bytes 104..107  bits 0-1, 2-3, 4-5, 6-7: high bits of scales 0..3, 4..7, 8..11, 12..15
    """
    first, second, high = words(blocks, 96, 3, torch.int32).unbind(1)
    scales = (
        (first & _LOW_4) | ((high << 4) & _BITS_4_5),
        (second & _LOW_4) | ((high << 2) & _BITS_4_5),
        ((first >> 4) & _LOW_4) | (high & _BITS_4_5),
        ((second >> 4) & _LOW_4) | ((high >> 2) & _BITS_4_5),
    )
    return torch.stack(scales, 1).view(torch.int8).sub_(32)


def scale_min(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and minima of eight sub-blocks, two (n, 8) float32, from 12 bytes at 4.

    bytes 4..7    EEAAAAAA  scales 0..3 (A), upper bits of scales 4..7 (E)
    bytes 8..11   eeaaaaaa  minima 0..3 (a), upper bits of minima 4..7 (e)
    bytes 12..15  eeeeEEEE  lower bits of minima and scales 4..7
    """
    sc, m, low = words(blocks, 4, 3, torch.int32).unbind(1)
    sc = torch.stack((sc & _LOW_6, (low & _LOW_4) | ((sc >> 2) & _BITS_4_5)), 1)
    m = torch.stack((m & _LOW_6, ((low >> 4) & _LOW_4) | ((m >> 2) & _BITS_4_5)), 1)
    return sc.view(torch.uint8).float(), m.view(torch.uint8).float()


def _scale_and_shift(blocks: Tensor, q: Tensor) -> Tensor:
    """(n, 256) float32: d·sc·q - dmin·m of Q4_K and Q5_K, whose blocks begin alike."""
    sc, m = scale_min(blocks)
    dl = (half(blocks, 0) * sc).unsqueeze(-1)
    ml = (half(blocks, 2) * m).unsqueeze(-1)
    return q.view(-1, 8, 32).float().mul_(dl).sub_(ml).view(-1, 256)


def dequantize_q4_k(blocks: Tensor) -> Tensor:
    """(n, 144) uint8 -> (n, 256) float32.   w = d·sc·q - dmin·m, sub-blocks of 32

    d: f16 | dmin: f16 | scales: 12 bytes | qs: 128 bytes
    """
    q = planes(blocks[:, 16:].reshape(-1, 4, 32), 4, dim=2)
    return _scale_and_shift(blocks, q)


def dequantize_q5_k(blocks: Tensor) -> Tensor:
    """(n, 176) uint8 -> (n, 256) float32.   w = d·sc·q - dmin·m, sub-blocks of 32

    d: f16 | dmin: f16 | scales: 12 bytes | qh: 32 bytes | qs: 128 bytes. Bit 4 of q lies in qh:
    bit j of its byte i belongs to weight 32j + i.
    """
    n = len(blocks)
    q = planes(blocks[:, 48:].reshape(n, 4, 32), 4, dim=2).view(n, 8, 32)
    high = planes(blocks[:, 16:48], 1, dim=1)
    return _scale_and_shift(blocks, q.bitwise_or_(high.bitwise_left_shift_(4)))


def dequantize_q6_k(blocks: Tensor) -> Tensor:
    """(n, 210) uint8 -> (n, 256) float32.   w = d·sc·(q - 32), sub-blocks of 16

    ql: 128 bytes | qh: 64 bytes | scales: 16 int8 | d: f16. Half a super-block takes 64 bytes of ql
    (low nibbles, then high nibbles) and 32 of qh (two bits for each of four groups of 32).
    """
    n = len(blocks)
    dl = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    q = planes(blocks[:, :128].reshape(n, 2, 64), 4, dim=2).view(n, 256)
    high = planes(blocks[:, 128:192].reshape(n, 2, 32), 2, dim=2).view(n, 256)
    q = q.bitwise_or_(high.bitwise_left_shift_(4)).view(torch.int8).sub_(32)
    return q.view(n, 16, 16).float().mul_(dl.unsqueeze(-1)).view(n, 256)
