"""Dequantising on CPUs by compiled kernels: one pass from blocks to the output, on every thread.

numba is optional: without it `dequantize` takes the torch formulation, whose numbers these equal.
What a kernel saves is traffic: weights are made in registers (`numba_blocks.py`), and are rounded
to bfloat16 on their way out.
"""

from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from numba import types
from torch import Tensor

from . import numba_blocks, tables
from .numba_jit import jit
from .numba_native import (
    address,
    address_of,
    bytes_at,
    call,
    call_with,
    floats_at,
    halves_at,
    in_parts,
    ints_at,
    longs_at,
    reader_of,
    shorts_at,
)
from .numba_vector import helper
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
_KINDS = {  # what `numba_bytes.put` takes
    torch.float32: types.float32,
    torch.uint16: types.uint16,
    torch.int32: types.int32,
    torch.int16: types.int16,
}
_PART = 2**18  # weights that a thread unpacks at a time, at the most
STREAMED = 2**22  # bytes, from which on the cache would not keep what is written
FAILURES = ()  # what `unpack` may raise where it cannot do its work at all


class _Told(NamedTuple):
    """What the threads are told, see `unpack`; names of arrays are addresses."""

    data: int
    out: int
    kind: int  # of `out`, in _KINDS
    blocks: int
    block_size: int  # in weights
    type_size: int  # in bytes
    unpack: int  # code for `unpack_by`
    grid: int
    codes: int


_told = reader_of(_Told)


@cache
def native_kernel(qtype: T, kind: torch.dtype) -> tuple[int, np.ndarray]:
    """What `unpack_by` is given: the code that unpacks a run of whole blocks into an array of
    `kind`, see `numba_bytes.put`; and the rows of the codebook, (n,) int64, if it has one.
    """
    kinds, grid = [types.uint8[::1], _KINDS[kind][::1]], np.empty(0, np.int64)
    if qtype in _GRIDS:
        grid = _GRIDS[qtype](torch.device("cpu")).long().numpy()
        kinds.append(types.int64[::1])
    return address_of(getattr(numba_blocks, qtype.name.lower()), *kinds), grid


@helper
def unpack_by(code, grid, codes, data, out):
    """Kernels' call of a `native_kernel`; `grid` is the address of `codes` rows."""
    done = call_with(code, data, out, longs_at(grid, codes)) if codes else call(code, data, out)
    if not done:
        raise MemoryError


def streams(out: Tensor) -> bool:
    """Whether what is written to `out` goes past the cache. It is in memory once the thread takes a
    lock, as the GIL's, or has met the others at the end of their work.
    """
    return out.nbytes >= STREAMED and not out.data_ptr() % 64


@helper
def _unpack_into(t, first, end, out):
    data = bytes_at(t.data + first * t.type_size, (end - first) * t.type_size)
    unpack_by(t.unpack, t.grid, t.codes, data, out[first * t.block_size : end * t.block_size])


@jit
def _unpack(told, first, end):
    t = _told(told)
    weights = t.blocks * t.block_size
    if t.kind == 0:
        _unpack_into(t, first, end, floats_at(t.out, weights))
    elif t.kind == 1:
        _unpack_into(t, first, end, shorts_at(t.out, weights))
    elif t.kind == 2:
        _unpack_into(t, first, end, ints_at(t.out, weights))
    else:
        _unpack_into(t, first, end, halves_at(t.out, weights))


def unpack(blocks: Tensor, qtype: T, out: Tensor) -> None:
    """blocks (n, type_size) into out, of one of DTYPES; both contiguous and on the CPU."""
    (block_size, type_size), n = GGML_QUANT_SIZES[qtype], len(blocks)
    blocks, kind = blocks.contiguous(), _BITS[out.dtype][streams(out)]
    code, grid = native_kernel(qtype, kind)
    told = _Told(
        address(blocks, torch.uint8),
        address(out.detach().view(kind), kind),
        list(_KINDS).index(kind),
        n,
        block_size,
        type_size,
        code,
        grid.ctypes.data,
        len(grid),
    )
    share = -(-n // torch.get_num_threads())
    in_parts(_unpack, told, n, max(1, min(_PART // block_size, share)), block_size)
