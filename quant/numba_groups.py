"""Kernels over groups of weights: their importance, the searches, and the scales of scales.

`x` and `w` are groups · size float32, flattened, a row a group; what comes out has a number for
each group. Codes are uint8, sixteen groups side by side: weight i of group g is
`codes[g // 16 · size · 16 + i · 16 + g % 16]`, so the last sixteen are always whole. Each kernel is
compiled by itself, once for all types.
"""

import numpy as np

from .numba_jit import ZERO, f4, i4, jit, nearest_int
from .numba_memory import load, store
from .numba_search import (
    make_q3_quants,
    make_qkx_quants,
    make_qp_quants,
    make_qx_quants,
    to_lanes,
)
from .numba_vector import LANES, root, splat
from .search import MAX_EPS

_EPS = f4(MAX_EPS)
_EXPONENT, _INF = 0x7F800000, f4(np.inf)


@jit
def weigh(x, w, size, factor, share, out):
    """out = w·sqrt(sigma2 + x²), sigma2 = factor · sum of a super-block's x² · share."""
    lanes = np.empty(size * LANES, np.float32)
    sums = np.empty(LANES, np.float32)
    for first in range(0, len(x) // size, LANES):
        to_lanes(x, size, first, lanes)
        total = splat(ZERO)
        for i in range(size):
            v = load(lanes, i * LANES)
            total += v * v
        store(sums, 0, total)
        for j in range(min(LANES, len(x) // size - first)):
            sigma2 = f4(factor) * sums[j] * f4(share)
            for i in range((first + j) * size, (first + j + 1) * size, LANES):
                v = load(x, i)
                store(out, i, load(w, i) * root(sigma2 + v * v))


@jit
def weigh_rows(x, importance, out):
    """out (rows, cols) = importance·sqrt(mean square of the row + x²)."""
    rows, cols = x.shape
    for r in range(rows):
        total = ZERO
        for i in range(cols):
            total += x[r, i] * x[r, i]
        sigma2 = total / f4(cols)
        for i in range(cols):
            out[r, i] = importance[i] * np.sqrt(sigma2 + x[r, i] * x[r, i])


@jit
def sum_groups(w, size, sums):
    lanes, total = np.empty(size * LANES, np.float32), np.empty(LANES, np.float32)
    for first in range(0, len(sums), LANES):
        to_lanes(w, size, first, lanes)
        found = splat(ZERO)
        for i in range(size):
            found += load(lanes, i * LANES)
        store(total, 0, found)
        for j in range(min(LANES, len(sums) - first)):
            sums[first + j] = total[j]


@jit
def search_ranges(x, w, size, nmax, grid, use_mad, scales, mins, codes):
    """`make_qkx_quants` for all groups; mins are to be subtracted.

    Empty `w`: |x| if use_mad (Q2_K), else |x| and the group's root mean square (Q4_K, Q5_K).
    """
    xl, wl, value = np.empty((3, size * LANES), np.float32)
    found, lows = np.empty((2, LANES), np.float32)
    for first in range(0, len(scales), LANES):
        to_lanes(x, size, first, xl)
        if len(w):
            to_lanes(w, size, first, wl)
        else:
            mean = splat(ZERO)
            if not use_mad:
                for i in range(size):
                    v = load(xl, i * LANES)
                    mean += v * v
                mean = root(mean / f4(size))
            for i in range(size):
                store(wl, i * LANES, mean + abs(load(xl, i * LANES)))
        scale, low = make_qkx_quants(xl, wl, size, nmax, grid, use_mad, value, codes, first * size)
        store(found, 0, scale)
        store(lows, 0, -low)
        for j in range(min(LANES, len(scales) - first)):
            scales[first + j], mins[first + j] = found[j], lows[j]


@jit
def search_symmetric(x, w, size, nmax, scales, codes):
    """`make_qx_quants` for all groups; empty `w` for x²."""
    xl, wl = np.empty((2, size * LANES), np.float32)
    found = np.empty(LANES, np.float32)
    for first in range(0, len(scales), LANES):
        to_lanes(x, size, first, xl)
        if len(w):
            to_lanes(w, size, first, wl)
        else:
            for i in range(0, size * LANES, LANES):
                store(wl, i, load(xl, i) * load(xl, i))
        store(found, 0, make_qx_quants(xl, wl, size, nmax, codes, first * size))
        for j in range(min(LANES, len(scales) - first)):
            scales[first + j] = found[j]


@jit
def search_by_moving(x, size, nmax, scales, codes):
    """`make_q3_quants` for all groups."""
    xl, value = np.empty((2, size * LANES), np.float32)
    found = np.empty(LANES, np.float32)
    for first in range(0, len(scales), LANES):
        to_lanes(x, size, first, xl)
        store(found, 0, make_q3_quants(xl, size, nmax, value, codes, first * size))
        for j in range(min(LANES, len(scales) - first)):
            scales[first + j] = found[j]


@jit
def search_fractions(values, w, steps, d, codes):
    """`make_qp_quants` for all groups: values and w (n, size), codes like them, int32."""
    size, flat, weights = values.shape[1], values.reshape(-1), w.reshape(-1)
    xl, wl, value = np.empty((3, size * LANES), np.float32)
    found = np.empty(LANES, np.float32)
    for first in range(0, len(values), LANES):
        to_lanes(flat, size, first, xl)
        to_lanes(weights, size, first, wl)
        store(found, 0, make_qp_quants(xl, wl, size, steps, value))
        for j in range(min(LANES, len(values) - first)):
            d[first + j] = found[j]
            for i in range(size):
                codes[first + j, i] = i4(value[i * LANES + j])


@jit
def largest_fractions(values, steps, d, codes):
    """values ≈ d·code with the largest at `steps`; codes are int32."""
    for b in range(len(values)):
        largest = ZERO
        for v in values[b]:
            largest = v if v > largest else largest
        d[b] = largest / f4(steps)
        inv = f4(steps) / largest if largest > ZERO else ZERO
        for i in range(values.shape[1]):
            code = nearest_int(inv * values[b, i])
            codes[b, i] = code if largest > ZERO else i4(0)


@jit
def signed_fractions(values, d, codes):
    """values ≈ d·(code - 32) with the largest at code 0; codes are int32. (Q3_K)"""
    for b in range(len(values)):
        largest = ZERO
        for v in values[b]:
            largest = v if abs(v) > abs(largest) else largest
        inv = f4(-32) / largest
        d[b] = ZERO if largest == ZERO else f4(1) / inv
        for i in range(values.shape[1]):
            code = nearest_int(inv * values[b, i])
            code = ((code + 128) & 0xFF) - 128  # an int8 in ggml
            codes[b, i] = 0 if largest == ZERO else min(max(code, -32), 31) + 32


@jit
def byte_fractions(values, d, codes):
    """values ≈ d·code with the largest at code -128; codes are int32, d is 0 for none. (Q6_K)"""
    for b in range(len(values)):
        largest = ZERO
        for v in values[b]:
            largest = v if abs(v) > abs(largest) else largest
        inv = f4(-128) / largest
        d[b] = ZERO if abs(largest) < _EPS else f4(1) / inv
        for i in range(values.shape[1]):
            codes[b, i] = min(nearest_int(inv * values[b, i]), i4(127))
