"""Kernels that write IQ4_NL and IQ4_XS, as `iq4_quantize.py` does.

`x` and `w` are groups · 32 float32, flattened; each group has its own scale.
"""

from itertools import pairwise

import numpy as np
from gguf.quants import IQ4_NL

from .numba_jit import ONE, ZERO, f4, i4, jit, nearest_int, store_half, u1
from .numba_memory import load, store
from .numba_search import find_largest, to_lanes
from .numba_small import pack_codes, reciprocal
from .numba_vector import LANES, helper, select, splat, stairs, truncated
from .search import MAX_EPS

_EPS = f4(MAX_EPS)
_LEVELS = [float(value) for value in IQ4_NL.kvalues]
_EDGES = [(a + b) / 2 for a, b in pairwise(_LEVELS)]
_LOWEST, _TRIES = f4(_LEVELS[0]), 7
nearest_level = stairs(_EDGES, _LEVELS)  # the upper one of two as near
level_index = stairs(_EDGES, range(16))


@helper
def level_sums(x, w, inv):
    """The sums of w·level·x and w·level² for the levels that `inv` gives."""
    sumqx, sumq2 = splat(ZERO), splat(ZERO)
    for i in range(0, 32 * LANES, LANES):
        v = load(x, i)
        level = nearest_level(inv * v)
        wq = load(w, i) * level
        sumqx += wq * v
        sumq2 += wq * level
    return sumqx, sumq2


@helper
def search_lanes(x, w):
    """The scales of sixteen groups, whose weights come as (32, 16) flattened."""
    largest = find_largest(x, 32)
    sumqx, sumq2 = level_sums(x, w, ONE / (-largest / _LOWEST))
    d = select(sumq2 > ZERO, sumqx / sumq2, ZERO)
    best = d * sumqx
    for step in range(-_TRIES, _TRIES + 1):
        sumqx, sumq2 = level_sums(x, w, (f4(step) + _LOWEST) / largest)
        better = (sumq2 > ZERO) & (sumqx * sumqx > best * sumq2)
        d = select(better, sumqx / sumq2, d)
        best = select(better, d * sumqx, best)
    return select(abs(largest) < _EPS, ZERO, d)


@jit
def search_levels(x, w, scales):
    """The scale of each group; empty `w` for x²."""
    xl, wl = np.empty((2, 32 * LANES), np.float32)
    found = np.empty(LANES, np.float32)
    for first in range(0, len(scales), LANES):
        to_lanes(x, 32, first, xl)
        if len(w):
            to_lanes(w, 32, first, wl)
        else:
            for i in range(0, 32 * LANES, LANES):
                store(wl, i, load(xl, i) * load(xl, i))
        store(found, 0, search_lanes(xl, wl))
        for j in range(min(LANES, len(scales) - first)):
            scales[first + j] = found[j]


@helper
def pack_levels(x, group, inv, qs):
    low, high = inv * load(x, group * 32), inv * load(x, group * 32 + LANES)
    pack_codes(truncated(level_index(low)), truncated(level_index(high)), qs)


@jit
def pack_iq4_nl(x, scales, out):
    for b in range(len(out)):
        store_half(out[b], 0, scales[b])
        pack_levels(x, b, reciprocal(scales[b]), out[b, 2:])


@jit
def pack_iq4_xs(x, scales, out):
    """scales: (8n,), out: (n, 136)."""
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
            pack_levels(x, 8 * b + i, reciprocal(d * f4(sc)), block[8 + 16 * i : 24 + 16 * i])
            block[2 + i // 4] |= u1(((sc + 32) >> 4) << (2 * (i % 4)))
            block[4 + i // 2] |= u1(((sc + 32) & 15) << (4 * (i % 2)))
