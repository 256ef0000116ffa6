"""Sums over weights on CPUs in one pass: what `measure.py` and the check for NaN need.

Arrays are 1-D float32. A sum is taken in float32 over sixteen lanes of a piece that stays in the
first cache, and from piece to piece in float64.
"""

import numpy as np

from .numba_jit import ZERO, f4, jit
from .numba_memory import load, store
from .numba_vector import LANES, bits_of, greater, largest_lane, select, splat

_PIECE = 2**12  # numbers: 256 of a lane
_EXPONENT, _INF = 0x7F800000, f4(np.inf)


@jit
def all_finite(x):
    """Neither NaN nor infinity, whose exponents are the highest."""
    whole = len(x) // LANES * LANES
    largest = bits_of(splat(ZERO))
    for i in range(0, whole, LANES):
        largest = greater(largest, bits_of(abs(load(x, i))))
    found = largest_lane(largest) < _EXPONENT
    for v in x[whole:]:
        found &= abs(v) < _INF
    return found


@jit
def sums(x, y, out):
    """out (5,) float64: Σ(x−y)², Σx², Σy², Σxy, max|x−y|; NaN in the first where x or y has any."""
    lanes, whole = np.empty(LANES, np.float32), len(x) // LANES * LANES
    out[:] = 0
    largest = splat(ZERO)
    for start in range(0, whole, _PIECE):
        ee, xx, yy, xy = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for i in range(start, min(start + _PIECE, whole), LANES):
            a, b = load(x, i), load(y, i)
            e = a - b
            ee += e * e
            xx += a * a
            yy += b * b
            xy += a * b
            size = abs(e)
            largest = select(size > largest, size, largest)
        for k, total in enumerate((ee, xx, yy, xy)):
            store(lanes, 0, total)
            for v in lanes:
                out[k] += v
    store(lanes, 0, largest)
    for v in lanes:
        out[4] = max(out[4], v)
    for i in range(whole, len(x)):
        a, b = np.float64(x[i]), np.float64(y[i])
        out[0] += (a - b) ** 2
        out[1] += a * a
        out[2] += b * b
        out[3] += a * b
        out[4] = max(out[4], abs(a - b))
