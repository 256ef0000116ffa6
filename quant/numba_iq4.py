"""Kernels that write IQ4_NL and IQ4_XS, as `iq4_quantize.py` does.

`x` and `w` are (n, 32) float32, a row a group that has its own scale.
"""

import numpy as np
from gguf.quants import IQ4_NL

from .numba_jit import LANES, ONE, ZERO, f4, i4, jit, nearest_int, store_half, u1
from .numba_search import to_lanes
from .numba_small import pack_nibbles, reciprocal
from .search import MAX_EPS

_EPS = f4(MAX_EPS)
_LEVELS = tuple(f4(value) for value in IQ4_NL.kvalues)
_TRIES = 7


@jit
def nearest_level(v):
    """(level, its index), the upper one of two as near."""
    low, high, index = _LEVELS[0], _LEVELS[1], i4(1)
    for k in range(1, 15):
        above = not (v < _LEVELS[k])
        low = _LEVELS[k] if above else low
        high = _LEVELS[k + 1] if above else high
        index = i4(k + 1) if above else index
    below = v - low < high - v
    return (low, u1(index - 1)) if below else (high, u1(index))


@jit
def search_lanes(x, w, d):
    """d (16,): the scales of sixteen groups, whose weights come as (32, 16) flattened."""
    largest, best, sumqx, sumq2, inv = np.empty((5, LANES), np.float32)
    largest[:] = ZERO
    for i in range(32):
        for j in range(LANES):
            v = x[i * LANES + j]
            largest[j] = v if abs(v) > abs(largest[j]) else largest[j]
    for step in range(-_TRIES - 1, _TRIES + 1):
        first = step == -_TRIES - 1
        for j in range(LANES):
            inv[j] = (
                ONE / (-largest[j] / _LEVELS[0]) if first else (f4(step) + _LEVELS[0]) / largest[j]
            )
            sumqx[j] = sumq2[j] = ZERO
        for i in range(32):
            for j in range(LANES):
                v = x[i * LANES + j]
                level, _ = nearest_level(inv[j] * v)
                wq = w[i * LANES + j] * level
                sumqx[j] += wq * v
                sumq2[j] += wq * level
        for j in range(LANES):
            better = (sumq2[j] > ZERO) & (first | (sumqx[j] * sumqx[j] > best[j] * sumq2[j]))
            if better:
                d[j] = sumqx[j] / sumq2[j]
            elif first:
                d[j] = ZERO
            if better or first:
                best[j] = d[j] * sumqx[j]
    for j in range(LANES):
        d[j] = ZERO if abs(largest[j]) < _EPS else d[j]


@jit
def search_levels(x, w, scales):
    """The scale of each group."""
    xl, wl = np.empty((2, 32 * LANES), np.float32)
    d = np.empty(LANES, np.float32)
    for first in range(0, len(x), LANES):
        to_lanes(x, first, xl)
        to_lanes(w, first, wl)
        search_lanes(xl, wl, d)
        for j in range(min(LANES, len(x) - first)):
            scales[first + j] = d[j]


@jit
def pack_levels(x, inv, codes, qs):
    for i in range(32):
        codes[i] = nearest_level(inv * x[i])[1]
    pack_nibbles(codes, qs)


@jit
def pack_iq4_nl(x, scales, out):
    codes = np.empty(32, np.uint8)
    for b in range(len(x)):
        store_half(out[b], 0, scales[b])
        pack_levels(x[b], reciprocal(scales[b]), codes, out[b, 2:])


@jit
def pack_iq4_xs(x, scales, out):
    """x: (8n, 32), scales: (8n,), out: (n, 136)."""
    codes = np.empty(32, np.uint8)
    for b in range(len(out)):
        group, block, largest = scales[8 * b : 8 * b + 8], out[b], ZERO
        for v in group:
            largest = v if abs(v) > abs(largest) else largest
        d = -largest / f4(32)
        inv_d = reciprocal(d)
        store_half(block, 0, d)
        block[2:8] = u1(0)
        for i in range(8):
            sc = min(max(nearest_int(inv_d * group[i]), i4(-32)), i4(31))
            pack_levels(x[8 * b + i], reciprocal(d * f4(sc)), codes, block[8 + 16 * i :])
            block[2 + i // 4] |= u1(((sc + 32) >> 4) << (2 * (i % 4)))
            block[4 + i // 2] |= u1(((sc + 32) & 15) << (4 * (i % 2)))
