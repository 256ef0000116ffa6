"""A tensor in a file, read a few rows at a time as float32, so that no model need fit in memory.

Plain file reads, not a mapping: what was read goes back to the system at once, and a memory limit
sees only the rows in hand.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from .dequant import dequantize
from .errors import DAMAGED, GGUFError
from .threads import PIECE

CHUNK = 2**20  # weights read at once: 4 MiB of float32, which stay in a CPU's cache


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a file and how to read it, as a matrix of `rows` x `cols`.

    shape: outermost first. label: its type for a reader's eyes. qtype: GGML's name for the stored
    bytes, None where GGUF has none (fp8). block: (weights, bytes) stored together. decode: maps
    the bytes of whole blocks (1-D uint8) to 1-D float32. scale: what the decoded weights are
    multiplied by, one for all or one for each index of the first dimension; None for none.

    Anything with these attributes and methods can be quantised (a live MODEL's weights, say).
    """

    path: str
    name: str
    shape: tuple[int, ...]
    label: str
    offset: int
    nbytes: int
    block: tuple[int, int]
    decode: Callable[[Tensor], Tensor]
    qtype: GGMLQuantizationType | None = None
    scale: Tensor | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return self.numel // self.cols if self.cols else 0

    @property
    def granule(self) -> int:
        """Rows that hold whole blocks together: `read` starts and stops at multiples of it."""
        return self.block[0] // math.gcd(self.block[0], self.cols) if self.cols else 1

    def chunks(self, granule: int | None = None) -> list[tuple[int, int]]:
        """(start, stop) in rows, about `CHUNK` weights in each, in order; see `granule`."""
        granule = granule or self.granule
        step = max(1, CHUNK // max(1, self.cols) // granule) * granule
        return [(at, min(at + step, self.rows)) for at in range(0, self.rows, step)]

    def raw(self, start: int, stop: int) -> Tensor:
        """The stored bytes of the rows `start` … `stop`, 1-D uint8."""
        size, width = self.block
        first, last = (row * self.cols // size * width for row in (start, stop))
        return read_bytes(self.path, self.name, self.offset + first, last - first)

    def read(self, start: int, stop: int) -> Tensor:
        """(stop - start, cols) float32."""
        values = self.decode(self.raw(start, stop)).view(stop - start, self.cols)
        if self.scale is None:
            return values
        if self.scale.numel() == 1:
            return values * self.scale.view(())
        each = self.rows // self.shape[0]  # rows that share an index of the first dimension
        index = torch.arange(start, stop) // each
        return values * self.scale.view(-1)[index].unsqueeze(1)


def plain_decoder(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Bytes of `dtype` -> float32, exact for all types of at most 32 bits but I32."""

    def decode(raw: Tensor) -> Tensor:
        values = raw.view(dtype)
        if dtype == torch.float32:
            return values
        out = torch.empty(values.shape)
        for piece, part in zip(values.split(PIECE), out.split(PIECE), strict=True):
            part.copy_(piece)
        return out

    return decode


def block_decoder(qtype: GGMLQuantizationType) -> Callable[[Tensor], Tensor]:
    """Bytes of GGML blocks -> float32, as gguf-py gives it."""
    size, width = GGML_QUANT_SIZES[qtype]
    return lambda raw: dequantize(raw, qtype, (raw.numel() // width * size,))


def read_bytes(path: str, name: str, offset: int, count: int) -> Tensor:
    """(count,) uint8 of a file. `name`: the tensor's, for the message.

    Raises: GGUFError where the file ends too early or cannot be read.
    """
    data = torch.empty(count, dtype=torch.uint8)
    view, got = memoryview(data.numpy()), 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while got < count:
                if not (step := file.readinto(view[got : got + 2**28])):
                    raise GGUFError(f"{path}: tensor {name!r} is cut short; {DAMAGED}")
                got += step
    except OSError as error:
        raise GGUFError(f"{os.fspath(path)}: tensor {name!r}: {error.strerror or error}") from error
    return data
