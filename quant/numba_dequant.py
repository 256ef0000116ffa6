"""Dequantising on CPUs by compiled kernels: one pass from blocks to the output, on every thread.

numba is optional: without it `dequantize` takes the torch formulation, whose numbers these equal.
What a kernel saves is traffic: weights are made in registers (`numba_blocks.py`), and are rounded
to bfloat16 on their way out.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from numba import types
from torch import Tensor

from . import numba_blocks, tables
from .numba_native import address_of
from .threads import in_threads
from .types import QTYPES

# The types that `numba_blocks` has a kernel for, and the tables of those that look up a codebook.
COMPILED = frozenset(qtype for qtype in QTYPES if qtype.name.lower() in vars(numba_blocks))
_GRIDS = {
    T.IQ1_S: tables.iq1_grid,
    T.IQ1_M: tables.iq1_grid,
    **{t: partial(tables.grid, t.name) for t in (T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S)},
}
_BITS = {
    torch.float32: (torch.float32, torch.int32),
    torch.bfloat16: (torch.uint16, torch.int16),
}
DTYPES = frozenset(_BITS)
STREAMED = 2**22  # bytes, from which on the cache would not keep what is written
FAILURES = ()  # what `unpack` may raise where it cannot do its work at all


@cache
def kernel(qtype: T) -> Callable[[np.ndarray, np.ndarray], None]:
    """(blocks uint8, out float32 or bfloat16's bits), both flat: unpacks a run of whole blocks."""
    function = getattr(numba_blocks, qtype.name.lower())
    if qtype not in _GRIDS:
        return function
    grid = _GRIDS[qtype](torch.device("cpu")).long().numpy()
    return lambda data, out: function(data, out, grid)


@cache
def native_kernel(qtype: T, dtype: torch.dtype) -> tuple[int, np.ndarray]:
    """The same, as `numba_native.call` or, with a codebook, `call_with` takes it, for weights of
    `dtype`; and the rows of the codebook.
    """
    kept = {torch.float32: types.float32, torch.bfloat16: types.uint16}[dtype]
    kinds, grid = [types.uint8[::1], kept[::1]], np.empty(0, np.int64)
    if qtype in _GRIDS:
        grid = _GRIDS[qtype](torch.device("cpu")).long().numpy()
        kinds.append(types.Array(types.int64, grid.ndim, "C"))
    return address_of(getattr(numba_blocks, qtype.name.lower()), *kinds), grid


def streams(out: Tensor) -> bool:
    """Whether what is written to `out` goes past the cache. It is in memory once the thread takes a
    lock, as the GIL's, or has met the others at the end of their work.
    """
    return out.nbytes >= STREAMED and not out.data_ptr() % 64


def writable(out: Tensor) -> np.ndarray:
    """`out` (contiguous, of one of DTYPES) as `numba_bytes.put` takes it, flat."""
    kept, streamed = _BITS[out.dtype]
    return out.view(streamed if streams(out) else kept).view(-1).numpy()


def unpack(blocks: Tensor, qtype: T, out: Tensor) -> None:
    """blocks (n, type_size) into out, of one of DTYPES; both contiguous and on the CPU."""
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    run, data = kernel(qtype), blocks.contiguous().view(-1).numpy()
    target = writable(out)

    def work(first: int, end: int) -> None:
        weights = target[first * block_size : end * block_size]
        run(data[first * type_size : end * type_size], weights)

    in_threads(work, len(blocks), block_size)
