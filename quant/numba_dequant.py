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
from .numba_native import (
    address_of,
    array_of,
    bytes_at,
    call,
    call_with,
    floats_at,
    ints_at,
    longs_at,
    native,
    shorts_at,
    take,
)
from .numba_vector import helper
from .threads import natively
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
_PART = 2**18  # weights that a thread unpacks at a time
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
    some: int  # blocks that are unpacked at a time
    next: int = 0  # what a thread will `take`
    done: int = 0  # parts


_TOLD = np.dtype([(name, np.int64) for name in _Told._fields])
_told_at, _halves_at = array_of(_TOLD), array_of(np.int16)
_NEXT, _DONE = (_TOLD.fields[name][1] for name in ("next", "done"))


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
    if codes:
        call_with(code, data, out, longs_at(grid, codes))
    else:
        call(code, data, out)


def streams(out: Tensor) -> bool:
    """Whether what is written to `out` goes past the cache. It is in memory once the thread takes a
    lock, as the GIL's, or has met the others at the end of their work.
    """
    return out.nbytes >= STREAMED and not out.data_ptr() % 64


def writable(out: Tensor) -> np.ndarray:
    """`out` (contiguous, of one of DTYPES) as `numba_bytes.put` takes it, flat."""
    kept, streamed = _BITS[out.dtype]
    return out.view(streamed if streams(out) else kept).view(-1).numpy()


@helper
def _unpack_parts(told, t, out):
    while True:
        first = take(told + _NEXT) * t.some
        if first >= t.blocks:
            return
        blocks = min(t.some, t.blocks - first)
        data = bytes_at(t.data + first * t.type_size, blocks * t.type_size)
        weights = out[first * t.block_size : (first + blocks) * t.block_size]
        unpack_by(t.unpack, t.grid, t.codes, data, weights)
        take(told + _DONE)


@native
def _unpack(told):
    t = _told_at(told, 1)[0]
    weights = t.blocks * t.block_size
    if t.kind == 0:
        _unpack_parts(told, t, floats_at(t.out, weights))
    elif t.kind == 1:
        _unpack_parts(told, t, shorts_at(t.out, weights))
    elif t.kind == 2:
        _unpack_parts(told, t, ints_at(t.out, weights))
    else:
        _unpack_parts(told, t, _halves_at(t.out, weights))


def unpack(blocks: Tensor, qtype: T, out: Tensor) -> None:
    """blocks (n, type_size) into out, of one of DTYPES; both contiguous and on the CPU."""
    (block_size, type_size), n = GGML_QUANT_SIZES[qtype], len(blocks)
    blocks, kind = blocks.contiguous(), _BITS[out.dtype][streams(out)]
    code, grid = native_kernel(qtype, kind)
    some = max(1, _PART // block_size)
    told = _Told(
        blocks.data_ptr(),
        out.data_ptr(),
        list(_KINDS).index(kind),
        n,
        block_size,
        type_size,
        code,
        grid.ctypes.data,
        len(grid),
        some,
    )
    told = np.array([told], _TOLD)
    natively(_unpack(), told.ctypes.data, n, block_size)
    if told["done"] != -(-n // some):
        raise MemoryError("there was none to unpack a tensor with: close other programs")
