"""Dequantising on CPUs by compiled kernels: one pass from blocks to the output, on every thread.

numba is optional: without it `dequantize` takes the torch formulation, whose numbers these equal.
What a kernel saves is traffic: a block is unpacked into a tile that stays in the first cache, and
is rounded to bfloat16 on its way out. Shifts are constants, so that LLVM makes vectors of the inner
loops. The kernels let go of the GIL, so plain threads do.

A kernel takes blocks (n, type_size) uint8, d and m (n,) float32 (scale and minimum, the halves read
by torch; m is d where a type has none) and out (n, 256) float32, or uint16: bfloat16's bits.
"""

from collections.abc import Callable

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from gguf.quants import IQ4_NL
from numpy import ndarray as Array
from torch import Tensor

from .bits import half
from .numba_jit import jit
from .threads import in_threads

I, U, F = np.int32, np.uint32, np.float32  # noqa: E741  numba computes in 64 bits unless told
_LEVELS = np.array(IQ4_NL.kvalues, np.float32)


@jit
def _store(tile, out, b):
    """Row b: float32 as it is, or rounded to bfloat16, half to even, as torch rounds it."""
    bits, row = tile.view(np.uint32), out[b]
    if out.itemsize == 4:
        for i in range(256):
            row[i] = tile[i]
        return
    for i in range(256):
        x = bits[i]
        rounded = (x + U(0x7FFF) + ((x >> U(16)) & U(1))) >> U(16)
        row[i] = np.uint16(U(0x7FC0) if (x & U(0x7FFFFFFF)) > U(0x7F800000) else rounded)


@jit
def _q2_k(blocks, d, m, out):
    tile, dl, ml = np.empty(256, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    for b in range(len(blocks)):
        for part in range(16):
            scale = I(blocks[b, part])
            dl[part], ml[part] = d[b] * F(scale & I(15)), m[b] * F(scale >> I(4))
        for group in range(2):
            qs, w = blocks[b, 16 + 32 * group : 48 + 32 * group], tile[128 * group :]
            a, c = dl[8 * group :], ml[8 * group :]
            for part in range(2):
                for j in range(16):
                    i = 16 * part + j
                    q = I(qs[i])
                    w[i] = F(q & I(3)) * a[part] - c[part]
                    w[i + 32] = F((q >> I(2)) & I(3)) * a[part + 2] - c[part + 2]
                    w[i + 64] = F((q >> I(4)) & I(3)) * a[part + 4] - c[part + 4]
                    w[i + 96] = F(q >> I(6)) * a[part + 6] - c[part + 6]
        _store(tile, out, b)


@jit
def _q3_k(blocks, d, m, out):
    tile, dl = np.empty(256, np.float32), np.empty(16, np.float32)
    for b in range(len(blocks)):
        hmask = blocks[b, :32]
        for part in range(16):
            low = (I(blocks[b, 96 + part % 8]) >> I(4 * (part // 8))) & I(15)
            high = (I(blocks[b, 104 + part % 4]) >> I(2 * (part // 4))) & I(3)
            dl[part] = d[b] * F((low | high << I(4)) - I(32))
        for group in range(2):
            qs, w, a = (
                blocks[b, 32 + 32 * group : 64 + 32 * group],
                tile[128 * group :],
                dl[8 * group :],
            )
            bit = I(4 * group)
            for part in range(2):
                for j in range(16):
                    i = 16 * part + j
                    q, h = I(qs[i]), I(hmask[i]) >> bit
                    w[i] = F(((q & I(3)) | (h & I(1)) << I(2)) - I(4)) * a[part]
                    w[i + 32] = F(((q >> I(2) & I(3)) | (h & I(2)) << I(1)) - I(4)) * a[part + 2]
                    w[i + 64] = F(((q >> I(4) & I(3)) | (h & I(4))) - I(4)) * a[part + 4]
                    w[i + 96] = F((q >> I(6) | (h >> I(1) & I(4))) - I(4)) * a[part + 6]
        _store(tile, out, b)


@jit
def _scale_min(block, d, m, dl, ml):
    """Scales and minima of the eight sub-blocks of Q4_K and Q5_K; see k.py for the bits."""
    for j in range(4):
        sc, mn, low = I(block[4 + j]), I(block[8 + j]), I(block[12 + j])
        dl[j], ml[j] = d * F(sc & I(63)), m * F(mn & I(63))
        dl[j + 4] = d * F((low & I(15)) | (sc >> I(6)) << I(4))
        ml[j + 4] = m * F((low >> I(4)) | (mn >> I(6)) << I(4))


@jit
def _q4_k(blocks, d, m, out):
    tile, dl, ml = np.empty(256, np.float32), np.empty(8, np.float32), np.empty(8, np.float32)
    for b in range(len(blocks)):
        _scale_min(blocks[b], d[b], m[b], dl, ml)
        for pair in range(4):
            qs, w = blocks[b, 16 + 32 * pair : 48 + 32 * pair], tile[64 * pair :]
            a, c, next_a, next_c = dl[2 * pair], ml[2 * pair], dl[2 * pair + 1], ml[2 * pair + 1]
            for i in range(32):
                q = I(qs[i])
                w[i] = F(q & I(15)) * a - c
                w[i + 32] = F(q >> I(4)) * next_a - next_c
        _store(tile, out, b)


@jit
def _q5_k(blocks, d, m, out):
    tile, dl, ml = np.empty(256, np.float32), np.empty(8, np.float32), np.empty(8, np.float32)
    for b in range(len(blocks)):
        _scale_min(blocks[b], d[b], m[b], dl, ml)
        qh = blocks[b, 16:48]
        for pair in range(4):
            qs, w = blocks[b, 48 + 32 * pair : 80 + 32 * pair], tile[64 * pair :]
            a, c, next_a, next_c = dl[2 * pair], ml[2 * pair], dl[2 * pair + 1], ml[2 * pair + 1]
            bit = I(2 * pair)
            for i in range(32):
                q, h = I(qs[i]), I(qh[i]) >> bit
                w[i] = F((q & I(15)) | (h & I(1)) << I(4)) * a - c
                w[i + 32] = F(q >> I(4) | (h & I(2)) << I(3)) * next_a - next_c
        _store(tile, out, b)


@jit
def _q6_k(blocks, d, m, out):
    tile, dl = np.empty(256, np.float32), np.empty(16, np.float32)
    for b in range(len(blocks)):
        scales = blocks[b, 192:208].view(np.int8)
        for part in range(16):
            dl[part] = d[b] * F(scales[part])
        for group in range(2):
            ql, qh = blocks[b, 64 * group :], blocks[b, 128 + 32 * group :]
            w, a = tile[128 * group :], dl[8 * group :]
            for part in range(2):
                for j in range(16):
                    i = 16 * part + j
                    x, y, h = I(ql[i]), I(ql[i + 32]), I(qh[i])
                    w[i] = F((x & I(15) | (h & I(3)) << I(4)) - I(32)) * a[part]
                    w[i + 32] = F((y & I(15) | (h & I(12)) << I(2)) - I(32)) * a[part + 2]
                    w[i + 64] = F((x >> I(4) | (h & I(48))) - I(32)) * a[part + 4]
                    w[i + 96] = F((y >> I(4) | (h >> I(2) & I(48))) - I(32)) * a[part + 6]
        _store(tile, out, b)


@jit
def _iq4_xs(blocks, d, m, out):
    tile = np.empty(256, np.float32)
    for b in range(len(blocks)):
        for part in range(8):
            low = (I(blocks[b, 4 + part // 2]) >> I(4 * (part % 2))) & I(15)
            high = (I(blocks[b, 2 + part // 4]) >> I(2 * (part % 4))) & I(3)
            dl = d[b] * F((low | high << I(4)) - I(32))
            qs, w = blocks[b, 8 + 16 * part :], tile[32 * part :]
            for i in range(16):
                w[i] = _LEVELS[qs[i] & 15] * dl
                w[i + 16] = _LEVELS[qs[i] >> 4] * dl
        _store(tile, out, b)


# The kernel of a type, and the bytes at which its halves d and m start.
KERNELS: dict[T, tuple[Callable[[Array, Array, Array, Array], None], int, int | None]] = {
    T.Q2_K: (_q2_k, 80, 82),
    T.Q3_K: (_q3_k, 108, None),
    T.Q4_K: (_q4_k, 0, 2),
    T.Q5_K: (_q5_k, 0, 2),
    T.Q6_K: (_q6_k, 208, None),
    T.IQ4_XS: (_iq4_xs, 0, None),
}
COMPILED = frozenset(KERNELS)
DTYPES = frozenset({torch.float32, torch.bfloat16})


def unpack(blocks: Tensor, qtype: T, out: Tensor) -> None:
    """blocks (n, type_size) into out (n, 256) of one of DTYPES, contiguous and on the CPU, both."""
    kernel, d_at, m_at = KERNELS[qtype]
    d = half(blocks, d_at)[:, 0]
    m = d if m_at is None else half(blocks, m_at)[:, 0]
    target = out if out.dtype is torch.float32 else out.view(torch.uint16)
    arrays = [t.numpy() for t in (blocks.contiguous(), d, m, target)]

    def work(first: int, end: int) -> None:
        kernel(*(array[first:end] for array in arrays))

    in_threads(work, len(blocks), 256)
