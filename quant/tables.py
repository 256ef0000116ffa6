"""Look-up tables of the IQ and microscaling types, as small tensors cached for each device.

A grid's row is 4 or 8 int8 values. It is stored as one int32 or int64, so that a look-up moves a
whole row; `.view(torch.int8)` then gives the values. The grids come from gguf-py's packed form.
"""

from functools import cache

import gguf.quants
import torch
from torch import Tensor


def _pack(rows: Tensor) -> Tensor:
    """(n, 4) or (n, 8) int8 -> (n,) int32 or int64."""
    word = torch.int32 if rows.shape[1] == 4 else torch.int64
    return rows.to(torch.int8).contiguous().view(word).view(-1)


def grid_rows(name: str) -> Tensor:
    """(rows, 4 or 8) float32: the grid of gguf-py's class of that name."""
    quant = getattr(gguf.quants, name)
    quant.init_grid()
    return torch.from_numpy(quant.grid).view(quant.grid_shape)


@cache
def grid(name: str, device: torch.device) -> Tensor:
    """The packed codebook of the IQ2 or IQ3 type `name`."""
    return _pack(grid_rows(name)).to(device)


@cache
def iq1_grid(device: torch.device) -> Tensor:
    """(4096,) int64: eight times (grid + delta), delta = 1/8 in the first half and -1/8 after.

    So bit 11 of an index is IQ1's sign of delta, and the values are whole numbers.
    """
    rows = grid_rows("IQ1_S") * 8
    return _pack(torch.cat((rows + 1, rows - 1))).to(device)


def _unpacked_bits(count: int) -> Tensor:
    """(2^count, count): the bits of each number, lowest first."""
    return torch.arange(2**count).unsqueeze(1) >> torch.arange(count) & 1


@cache
def bits(value: int, device: torch.device) -> Tensor:
    """(256,) int64: for each byte eight values, `value` where the bit is set and 0 elsewhere."""
    return _pack(value * _unpacked_bits(8)).to(device)


@cache
def signs(device: torch.device) -> Tensor:
    """(256,) int64: for each byte eight factors, -1 where the bit is set and 1 elsewhere."""
    return _pack(1 - 2 * _unpacked_bits(8)).to(device)


@cache
def even_signs(device: torch.device) -> Tensor:
    """(128,) int64: as `signs`, for seven bits: the eighth makes the count of -1 even (ksigns)."""
    seven = _unpacked_bits(7)
    eight = torch.cat((seven, seven.sum(1, keepdim=True) & 1), 1)
    return _pack(1 - 2 * eight).to(device)


@cache
def nibble_values(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two (256,) int8: what a byte's low and its high nibble stand for in type `name`."""
    values = torch.tensor(getattr(gguf.quants, name).kvalues, dtype=torch.int8)
    byte = torch.arange(256)
    return values[byte & 0x0F].to(device), values[byte >> 4].to(device)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """The int8 values of the rows `index` (any integer dtype, contiguous), one axis more."""
    words = table.index_select(0, index.flatten().int())
    return words.view(torch.int8).view(*index.shape, table.itemsize)


def look_up_nibbles(name: str, qs: Tensor) -> Tensor:
    """(..., w) bytes -> (..., 2, w) int8: values of the low nibbles, then of the high ones."""
    low, high = nibble_values(name, qs.device)
    index = qs.flatten().int()
    parts = (low.index_select(0, index), high.index_select(0, index))
    return torch.stack([part.view(qs.shape) for part in parts], -2)
