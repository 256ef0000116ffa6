"""Unpacking and packing bytes: the few moves that every block format is made of.

All work on uint8 tensors in which a row is a block. Shifts and masks are whole-tensor operations on
bytes (a quarter of the traffic of float32, and vectorised), and pieces are put in their order by
one `stack`, which on a CPU is about ten times faster than broadcasting a tensor of shift counts.
GGUF is little-endian, and so are the machines that torch supports.
"""

import torch
from torch import Tensor


def half(blocks: Tensor, start: int) -> Tensor:
    """(n, 1) float32: the IEEE half at byte `start` of each block."""
    return words(blocks, start, 1, torch.float16).float()


def words(blocks: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """(n, count) `dtype`: `count` little-endian words from byte `start` on, of any alignment."""
    piece = blocks[:, start : start + count * dtype.itemsize]
    return piece.clone(memory_format=torch.contiguous_format).view(dtype)


def planes(x: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Split each byte into its 8/bits fields, lowest first, along a new axis `dim`."""
    x = x.contiguous()  # one slow loop over short rows, not one for each shift
    if bits == 4:  # a mask or a shift alone already isolates a nibble
        return torch.stack((x & 0x0F, x >> 4), dim)
    mask = (1 << bits) - 1
    return torch.stack([x >> shift for shift in range(0, 8, bits)], dim).bitwise_and_(mask)


def fields(x: Tensor, bits: int, shifts: tuple[int, ...]) -> Tensor:
    """(..., len(shifts)): the fields of `bits` bits that start at the given bits of each word."""
    return torch.stack([x >> shift for shift in shifts], -1).bitwise_and_((1 << bits) - 1)


def pack_planes(x: Tensor, bits: int, dim: int = -1) -> Tensor:
    """uint8: the inverse of `planes`; joins 8/bits fields along `dim`, the lowest bits first."""
    packed = torch.zeros_like(x.select(dim, 0), dtype=torch.uint8)
    for i, field in enumerate(x.unbind(dim)):
        packed |= field.to(torch.uint8) << (bits * i)
    return packed
