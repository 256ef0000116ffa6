"""A quantised matrix times a few vectors on CPUs, without ever writing the matrix out.

With few vectors a product costs less than moving the unpacked weights to memory and back. Here a
tile of rows is unpacked by `numba_dequant`'s kernels and multiplied while it is in cache, all in
float32. A sum runs in 64 lanes, whatever the machine, so results do not depend on it.
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor

from .numba_dequant import kernel
from .numba_jit import ZERO, jit
from .numba_memory import load, sum_of_lanes
from .numba_vector import splat
from .threads import in_threads

MOST = 4  # vectors; with more of them a product by torch wins
LANES = 64  # of a sum, so columns must be whole sixty-fours
_TILE = 2**19  # weights in a tile: each of its calls waits for the GIL, which costs more than cache


@jit
def _dots(tile, x, out):
    """out (rows, vectors) = tile (rows, columns) times x (vectors, columns), all float32."""
    lanes, columns = np.empty(16, np.float32), x.shape[1]
    for r in range(len(tile)):
        for v in range(len(x)):
            row, vector = tile[r], x[v]
            a = b = c = d = splat(ZERO)
            for i in range(0, columns, LANES):
                a += load(row, i) * load(vector, i)
                b += load(row, i + 16) * load(vector, i + 16)
                c += load(row, i + 32) * load(vector, i + 32)
                d += load(row, i + 48) * load(vector, i + 48)
            out[r, v] = sum_of_lanes((a + b) + (c + d), lanes)


def matvec(blocks: Tensor, qtype: T, x: Tensor) -> Tensor:
    """x (vectors, columns) float32 times the transpose of a matrix -> (vectors, rows) float32.

    blocks: (rows, bytes of a row) uint8 of a type in `numba_dequant.COMPILED`, on the CPU.
    """
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    rows, columns = len(blocks), x.shape[1]
    row_size = columns // block_size * type_size
    unpack, data = kernel(qtype), blocks.contiguous().view(-1).numpy()
    vectors = x.contiguous().numpy()
    out = np.empty((rows, len(x)), np.float32)
    step = min(max(1, _TILE // columns), rows)

    def work(first: int, end: int) -> None:
        tile = np.empty((step, columns), np.float32)
        for start in range(first, end, step):
            stop = min(start + step, end)
            part = tile[: stop - start]
            unpack(data[start * row_size : stop * row_size], part.reshape(-1))
            _dots(part, vectors, out[start:stop])

    in_threads(work, rows, columns)
    return torch.from_numpy(out).T.contiguous()
