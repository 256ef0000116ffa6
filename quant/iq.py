"""The IQ types: super-blocks of 256 weights whose vectors of 4 or 8 are rows of a fixed codebook.

Source: ggml `dequantize_row_iq1_s` … `dequantize_row_iq4_xs`; gguf-py `quants.py`. Codes and signs
are multiplied as int8, which is exact, so each weight sees one float32 product.
"""

import torch
from torch import Tensor

from . import tables
from .bits import fields, half, planes, words


def _scaled(db: Tensor, q: Tensor) -> Tensor:
    """(n, 256) float32 = db (n, sub-blocks) · q (n, any shape of 256 int8)."""
    n, sub_blocks = db.shape
    return q.view(n, sub_blocks, -1).float().mul_(db.unsqueeze(-1)).view(n, 256)


def _nibble_scales(scales: Tensor) -> Tensor:
    """(n, w) bytes -> (n, 2w) float32, low nibble first."""
    return planes(scales, 4).flatten(1).float()


def _even_signs_and_scale(aux: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 8) int32 -> signs (n, 32, 8) int8 and 4-bit scales (n, 8) float32.

    Each word holds four 7-bit sign patterns and, in its upper four bits, the scale.
    """
    index = fields(aux, 7, (0, 7, 14, 21)).flatten(1)
    scale = (aux >> 28) & 0x0F
    return tables.look_up(tables.even_signs(aux.device), index), scale.float()


def dequantize_iq2_xxs(blocks: Tensor) -> Tensor:
    """(n, 66) uint8 -> (n, 256) float32.   w = d·(sc + 1/2)/4 · grid · sign, sub-blocks of 32

    d: f16 | for each sub-block four bytes of grid indices and a word of signs and scale
    """
    pairs = words(blocks, 2, 16, torch.int32).view(-1, 8, 2)
    index = pairs[..., 0].contiguous().view(torch.uint8)
    signs, sc = _even_signs_and_scale(pairs[..., 1])
    q = tables.look_up(tables.grid("IQ2_XXS", blocks.device), index).mul_(signs)
    return _scaled(half(blocks, 0) * (sc + 0.5) * 0.25, q)


def dequantize_iq2_xs(blocks: Tensor) -> Tensor:
    """(n, 74) uint8 -> (n, 256) float32.   w = d·(sc + 1/2)/4 · grid · sign, sub-blocks of 16

    d: f16 | qs: 32 words of 9 bits grid index and 7 bits signs | scales: 8 bytes of nibbles
    """
    qs = words(blocks, 2, 32, torch.int16)
    q = tables.look_up(tables.grid("IQ2_XS", blocks.device), qs & 0x1FF)
    q.mul_(tables.look_up(tables.even_signs(blocks.device), (qs >> 9) & 0x7F))
    return _scaled(half(blocks, 0) * (_nibble_scales(blocks[:, 66:]) + 0.5) * 0.25, q)


def dequantize_iq2_s(blocks: Tensor) -> Tensor:
    """(n, 82) uint8 -> (n, 256) float32.   w = d·(sc + 1/2)/4 · grid · sign, sub-blocks of 16

    d: f16 | qs: 32 bytes | signs: 32 bytes | qh: 8 bytes of 2-bit index tops | scales: 8 bytes
    """
    high = planes(blocks[:, 66:74], 2).flatten(1).int()
    index = (high << 8).bitwise_or_(blocks[:, 2:34])
    q = tables.look_up(tables.grid("IQ2_S", blocks.device), index)
    q.mul_(tables.look_up(tables.signs(blocks.device), blocks[:, 34:66]))
    return _scaled(half(blocks, 0) * (_nibble_scales(blocks[:, 74:]) + 0.5) * 0.25, q)


def dequantize_iq3_xxs(blocks: Tensor) -> Tensor:
    """(n, 98) uint8 -> (n, 256) float32.   w = d·(sc + 1/2)/2 · grid · sign, sub-blocks of 32

    d: f16 | qs: 64 bytes | for each sub-block a word of signs and scale
    """
    signs, sc = _even_signs_and_scale(words(blocks, 66, 8, torch.int32))
    q = tables.look_up(tables.grid("IQ3_XXS", blocks.device), blocks[:, 2:66])
    return _scaled(half(blocks, 0) * (sc + 0.5) * 0.5, q.view(signs.shape).mul_(signs))


def dequantize_iq3_s(blocks: Tensor) -> Tensor:
    """(n, 110) uint8 -> (n, 256) float32.   w = d·(1 + 2·sc) · grid · sign, sub-blocks of 32

    d: f16 | qs: 64 bytes | qh: 8 bytes of index tops | signs: 32 bytes | scales: 4 bytes
    """
    high = tables.look_up(tables.bits(1, blocks.device), blocks[:, 66:74]).flatten(1).int()
    index = (high << 8).bitwise_or_(blocks[:, 2:66])
    q = tables.look_up(tables.grid("IQ3_S", blocks.device), index)
    signs = tables.look_up(tables.signs(blocks.device), blocks[:, 74:106])
    sc = _nibble_scales(blocks[:, 106:])
    return _scaled(half(blocks, 0) * (1 + 2 * sc), q.view(signs.shape).mul_(signs))


def _iq1(dl: Tensor, qs: Tensor, high: Tensor) -> Tensor:
    """(n, 256) float32: dl·(grid ± 1/8); `high` (n, 32): three index bits and the sign of 1/8.

    The table holds eight times the values; an eighth of dl is exact, so rounding is as in ggml.
    """
    index = (high.int() << 8).bitwise_or_(qs)
    return _scaled(dl * 0.125, tables.look_up(tables.iq1_grid(qs.device), index))


def dequantize_iq1_s(blocks: Tensor) -> Tensor:
    """(n, 50) uint8 -> (n, 256) float32.   w = d·(2·sc + 1)·(grid ± 1/8), sub-blocks of 32

    d: f16 | qs: 32 bytes | qh: 8 words: 4 × 3 index bits, scale (3 bits), sign of 1/8
    """
    qh = words(blocks, 34, 8, torch.int16)
    dl = half(blocks, 0) * (2 * ((qh >> 12) & 7) + 1)
    high = fields(qh, 3, (0, 3, 6, 9)) | ((qh >> 12) & 8).unsqueeze(-1)
    return _iq1(dl, blocks[:, 2:34], high.flatten(1))


def dequantize_iq1_m(blocks: Tensor) -> Tensor:
    """(n, 56) uint8 -> (n, 256) float32.   w = d·(2·sc + 1)·(grid ± 1/8), scales for 16 weights

    qs: 32 bytes | qh: 16 bytes of nibbles (3 index bits, sign of 1/8) | scales: 4 words of 4 × 3
    bits, whose upper nibbles together are d, lowest first.
    """
    scales = words(blocks, 48, 4, torch.int16)
    d = fields(scales, 4, (12,)).squeeze(-1).int()
    d = (d << torch.arange(0, 16, 4, device=d.device, dtype=torch.int32)).sum(1, keepdim=True)
    d = d.to(torch.int16).view(torch.float16).float()
    sc = fields(scales, 3, (0, 3, 6, 9)).flatten(1)
    return _iq1(d * (2 * sc + 1), blocks[:, :32], planes(blocks[:, 32:48], 4).flatten(1))


def dequantize_iq4_nl(blocks: Tensor) -> Tensor:
    """(n, 18) uint8 -> (n, 32) float32.   d: f16 | qs: 16 bytes.   w = d·value[q]"""
    q = tables.look_up_nibbles("IQ4_NL", blocks[:, 2:])
    return q.flatten(1).float().mul_(half(blocks, 0))


def dequantize_iq4_xs(blocks: Tensor) -> Tensor:
    """(n, 136) uint8 -> (n, 256) float32.   w = d·(sc - 32)·value[q], sub-blocks of 32

    d: f16 | scales_h: 8 × 2 bits | scales_l: 8 nibbles | qs: 128 bytes
    """
    high = planes(blocks[:, 2:4], 2).flatten(1)
    low = planes(blocks[:, 4:8], 4).flatten(1)
    sc = (low | (high << 4)).view(torch.int8).sub_(32)
    q = tables.look_up_nibbles("IQ4_NL", blocks[:, 8:].unflatten(1, (8, 16)))
    return _scaled(half(blocks, 0) * sc.float(), q)
