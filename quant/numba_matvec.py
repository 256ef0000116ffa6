"""A quantised matrix times a few vectors on CPUs, without ever writing the matrix out.

With few vectors a product costs less than moving the unpacked weights to memory and back. Here a
tile of rows is unpacked by `numba_dequant`'s kernels and multiplied while it is in the second
cache, all in float32. A sum runs in 64 lanes, whatever the machine, so results do not depend on it.
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor

from .bits import half
from .numba_dequant import KERNELS
from .numba_jit import jit
from .threads import in_threads

MOST = 4  # vectors; with more of them a product by torch wins
_LANES, _TILE = 64, 2**17  # weights in a tile: 512 KiB of float32


@jit
def _dots(tile, x, out):
    """out (rows, vectors) = tile (rows, columns) times x (vectors, columns), all float32."""
    lanes = np.empty(64, np.float32)
    for r in range(len(tile)):
        for v in range(len(x)):
            row, vector = tile[r], x[v]
            for i in range(64):
                lanes[i] = np.float32(0.0)
            for start in range(0, len(row), 64):
                a, b = row[start : start + 64], vector[start : start + 64]
                for i in range(64):
                    lanes[i] += a[i] * b[i]
            total = np.float32(0.0)
            for i in range(64):
                total += lanes[i]
            out[r, v] = total


def matvec(blocks: Tensor, qtype: T, x: Tensor) -> Tensor:
    """x (vectors, columns) float32 times the transpose of a matrix -> (vectors, rows) float32.

    blocks: (rows, bytes of a row) uint8 of a type in `numba_dequant.COMPILED`, on the CPU.
    """
    kernel, d_at, m_at = KERNELS[qtype]
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    rows, columns = len(blocks), x.shape[1]
    each = columns // block_size
    flat = blocks.reshape(-1, type_size)
    d = half(flat, d_at)[:, 0]
    m = d if m_at is None else half(flat, m_at)[:, 0]
    packed, d, m, vectors = (t.contiguous().numpy() for t in (flat, d, m, x))
    out = np.empty((rows, len(x)), np.float32)
    step = max(1, _TILE // columns)

    def work(first: int, end: int) -> None:
        tile = np.empty((step * each, block_size), np.float32)
        for start in range(first, end, step):
            stop = min(start + step, end)
            part, size = slice(start * each, stop * each), (stop - start) * each
            kernel(packed[part], d[part], m[part], tile[:size])
            _dots(tile[:size].reshape(stop - start, columns), vectors, out[start:stop])

    in_threads(work, rows, columns)
    return torch.from_numpy(out).T.contiguous()
