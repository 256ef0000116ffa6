"""Kernels over groups of weights: their importance, the searches, and the scales of scales.

`x` and `w` are (groups, size) float32, a row a group, except that `weigh` takes super-blocks; what
comes out has a number for each group, and codes (groups, size) uint8. Each kernel is compiled by
itself, once for all types: nested in the types' own, LLVM would take a minute for each.
"""

import numpy as np

from .numba_jit import LANES, ZERO, f4, i4, jit, nearest_int
from .numba_search import (
    LOW,
    SCALE,
    SCRATCH,
    make_q3_quants,
    make_qkx_quants,
    make_qp_quants,
    make_qx_quants,
    to_lanes,
)


@jit
def weigh(x, w, factor, share, out):
    """out = w·sqrt(sigma2 + x²), sigma2 = factor · sum of the row's x² · share."""
    for b in range(len(x)):
        total = ZERO
        for v in x[b]:
            total += v * v
        sigma2 = f4(factor) * total * f4(share)
        for i in range(x.shape[1]):
            out[b, i] = w[b, i] * np.sqrt(sigma2 + x[b, i] * x[b, i])


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
def weigh_by_size(x, out):
    """out = root mean square of the group's 32 weights + |x|"""
    for b in range(len(x)):
        total = ZERO
        for v in x[b]:
            total += v * v
        mean = np.sqrt(total / f4(32))
        for i in range(32):
            out[b, i] = mean + abs(x[b, i])


@jit
def sum_groups(w, sums):
    for b in range(len(w)):
        total = ZERO
        for v in w[b]:
            total += v
        sums[b] = total


@jit
def search_ranges(x, w, nmax, grid, use_mad, scales, mins, codes):
    """`make_qkx_quants` for all groups; mins are to be subtracted."""
    size = x.shape[1]
    xl, wl, value = np.empty((3, size * LANES), np.float32)
    s, found = np.empty(SCRATCH, np.float32), np.empty(size * LANES, np.uint8)
    for first in range(0, len(x), LANES):
        to_lanes(x, first, xl)
        to_lanes(w, first, wl)
        make_qkx_quants(xl, wl, size, nmax, grid, use_mad, s, value, found)
        for j in range(min(LANES, len(x) - first)):
            scales[first + j], mins[first + j] = s[SCALE + j], -s[LOW + j]
            for i in range(size):
                codes[first + j, i] = found[i * LANES + j]


@jit
def search_symmetric(x, w, nmax, scales, codes):
    """`make_qx_quants` for all groups."""
    size = x.shape[1]
    xl, wl = np.empty((2, size * LANES), np.float32)
    s, found = np.empty(SCRATCH, np.float32), np.empty(size * LANES, np.uint8)
    for first in range(0, len(x), LANES):
        to_lanes(x, first, xl)
        to_lanes(w, first, wl)
        make_qx_quants(xl, wl, size, nmax, s, found)
        for j in range(min(LANES, len(x) - first)):
            scales[first + j] = s[SCALE + j]
            for i in range(size):
                codes[first + j, i] = found[i * LANES + j]


@jit
def search_by_moving(x, nmax, scales, codes):
    """`make_q3_quants` for all groups."""
    size = x.shape[1]
    xl, value = np.empty((2, size * LANES), np.float32)
    s, found = np.empty(SCRATCH, np.float32), np.empty(size * LANES, np.uint8)
    for first in range(0, len(x), LANES):
        to_lanes(x, first, xl)
        make_q3_quants(xl, size, nmax, s, value, found)
        for j in range(min(LANES, len(x) - first)):
            scales[first + j] = s[SCALE + j]
            for i in range(size):
                codes[first + j, i] = found[i * LANES + j]


@jit
def search_fractions(values, w, steps, d, codes):
    """`make_qp_quants` for all groups; codes are int32."""
    size = values.shape[1]
    xl, wl = np.empty((2, size * LANES), np.float32)
    s, found = np.empty(SCRATCH, np.float32), np.empty(size * LANES, np.int32)
    for first in range(0, len(values), LANES):
        to_lanes(values, first, xl)
        to_lanes(w, first, wl)
        make_qp_quants(xl, wl, size, steps, s, found)
        for j in range(min(LANES, len(values) - first)):
            d[first + j] = s[SCALE + j]
            for i in range(size):
                codes[first + j, i] = found[i * LANES + j]


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
