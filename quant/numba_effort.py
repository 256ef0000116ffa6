"""The searches of `effort.py`, compiled; its comments are not repeated here.

`x` and `w` are n · 256 float32, flattened; `w` may be empty, for ones.
"""

import numpy as np

from .effort import GRID, RANGE_STEP, RANGE_TRIES, RANGE_WINDOW, ROUNDS, TRIALS, WINDOWS
from .numba_jit import ONE, ZERO, f4, half_bits, half_value, i4, jit
from .numba_memory import load, store
from .numba_search import make_qkx_quants, make_qx_quants, range_code, signed_code, to_lanes
from .numba_vector import LANES, floats, greater, helper, lesser, nearest, select, splat

_INF, _HIGHEST, _SAFE = f4(np.inf), 63, f4(1e-6)


@helper
def to_half(v):
    return f4(half_value(half_bits(v)) + ZERO)


@helper
def inverse(v):
    """1/v, and 0 for 0."""
    return select(v == ZERO, ZERO, ONE / v)


@helper
def scalar_inverse(v):
    return ONE / v if v != ZERO else ZERO


@helper
def weights_to_lanes(w, size, first, lanes):
    if len(w):
        to_lanes(w, size, first, lanes)
    else:
        lanes[:] = ONE


@helper
def within(code, low, high):
    return lesser(greater(code, low), high)


@helper
def total(values, first, count):
    found = ZERO
    for v in values[first : first + count]:
        found += v
    return found


@helper
def signed_error(x, w, nmax, scale):
    error, inv = splat(ZERO), inverse(scale)
    for i in range(0, 16 * LANES, LANES):
        v = load(x, i)
        diff = v - scale * floats(signed_code(inv * v, nmax))
        error += load(w, i) * diff * diff
    return error


@helper
def signed_refit(x, w, nmax, d, sc, a, b):
    """d by least squares; `a` and `b` are scratch."""
    sumlx, suml2, inv, times = splat(ZERO), splat(ZERO), inverse(d * floats(sc)), floats(sc)
    for i in range(0, 16 * LANES, LANES):
        v = load(x, i)
        code = floats(signed_code(inv * v, nmax)) * times
        wc = load(w, i) * code
        sumlx += wc * v
        suml2 += wc * code
    store(a, 0, sumlx)
    store(b, 0, suml2)
    return to_half(total(a, 0, LANES) * scalar_inverse(total(b, 0, LANES)))


@jit
def fit_symmetric(x, w, nmax, limit, d, sc):
    """d (n,), sc (n, 16) int32."""
    xl, wl = np.empty((2, 16 * LANES), np.float32)
    errors, multiples = np.empty((2, LANES), np.float32)
    codes = np.empty(16 * LANES, np.uint8)
    for n in range(len(d)):
        to_lanes(x, 16, n * 16, xl)
        weights_to_lanes(w, 16, n * 16, wl)
        scales = make_qx_quants(xl, wl, 16, nmax, codes, 0)
        store(multiples, 0, scales)
        largest, best = ZERO, ZERO
        for v in multiples:
            largest = v if abs(v) > abs(largest) else largest
        for trial in range(TRIALS):
            half = to_half(largest / f4(trial * limit // 16 - limit))
            found = within(nearest(scales * scalar_inverse(half)), -limit, limit - 1)
            for turn in range(ROUNDS):
                center, least = found, splat(_INF)
                window = WINDOWS[turn]
                for k in range((2 if turn == 0 else 1) * (2 * window + 1)):
                    offset, negative = k % (2 * window + 1) - window, k > 2 * window
                    tried = within((0 - center if negative else center) + offset, -limit, limit - 1)
                    error = signed_error(xl, wl, nmax, half * floats(tried))
                    better = error < least
                    least, found = select(better, error, least), select(better, tried, found)
                store(errors, 0, least)
                error = total(errors, 0, LANES)
                if (trial == 0 and turn == 0) or error < best:
                    best, d[n] = error, half
                    store(multiples, 0, floats(found))
                    for j in range(LANES):
                        sc[n, j] = i4(multiples[j])
                half = signed_refit(xl, wl, nmax, half, found, errors, multiples)


@helper
def range_pass(x, w, nmax, scale, inv, low):
    """The error, and the sum of w·(scale·code - x)."""
    error, rests = splat(ZERO), splat(ZERO)
    for i in range(0, 32 * LANES, LANES):
        v, weight = load(x, i), load(w, i)
        rest = scale * floats(range_code(inv * (v + low), nmax)) - v
        diff = rest - low
        error += weight * diff * diff
        rests += weight * rest
    return error, rests


@helper
def search_around(x, w, inv_w, nmax, d, dmin, sc, m):
    least, best_sc, best_m, inv_dmin = splat(_INF), sc, m, inverse(dmin)
    for offset in range(-RANGE_WINDOW, RANGE_WINDOW + 1):
        tried, low = within(sc + offset, 0, _HIGHEST), m
        scale = d * floats(tried)
        inv = inverse(scale)
        for _ in range(RANGE_TRIES):
            error, rests = range_pass(x, w, nmax, scale, inv, dmin * floats(low))
            better = error < least
            least = select(better, error, least)
            best_sc, best_m = select(better, tried, best_sc), select(better, low, best_m)
            low = within(nearest(rests * inv_w * inv_dmin), 0, _HIGHEST)
    return least, best_sc, best_m


@helper
def range_refit(x, w, nmax, d, dmin, sc, m, sums, halves):
    """halves (2, 16), d and dmin for each lane, by least squares; `sums` (5, 16) is scratch."""
    uu, u, ux, sum_w, sum_x = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
    times, low, v = floats(sc), dmin * floats(m), floats(m)
    inv = inverse(d * times)
    for i in range(0, 32 * LANES, LANES):
        value, weight = load(x, i), load(w, i)
        code = floats(range_code(inv * (value + low), nmax)) * times
        wc = weight * code
        uu += wc * code
        u += wc
        ux += wc * value
        sum_w += weight
        sum_x += weight * value
    store(sums[0], 0, uu)
    store(sums[1], 0, u * v)
    store(sums[2], 0, sum_w * v * v)
    store(sums[3], 0, ux)
    store(sums[4], 0, sum_x * v)
    for h in range(0, LANES, 8):
        uu, uv, vv = total(sums[0], h, 8), total(sums[1], h, 8), total(sums[2], h, 8)
        ux, vx = total(sums[3], h, 8), total(sums[4], h, 8)
        det = uu * vv - uv * uv
        inv_det = scalar_inverse(det)
        new_d = to_half((ux * vv - uv * vx) * inv_det)
        new_dmin = to_half((uv * ux - uu * vx) * inv_det)
        if det > _SAFE * (uu * vv) and new_d > ZERO and new_dmin >= ZERO:
            halves[0, h : h + 8], halves[1, h : h + 8] = new_d, new_dmin


@helper
def begin(values, top, halves):
    """halves (16,): the largest of eight values, at multiple `top`."""
    for h in range(0, LANES, 8):
        largest = values[h]
        for v in values[h : h + 8]:
            largest = max(largest, v)
        halves[h : h + 8] = to_half(largest / f4(top))


@helper
def keep(least, halves, sc, m, sign, first, best, d, dmin, scs, ms):
    """Of two super-blocks from `first` on, what is better than `best` (2,)."""
    errors, found_sc, found_m = np.empty((3, LANES), np.float32)
    store(errors, 0, least)
    store(found_sc, 0, floats(sc))
    store(found_m, 0, floats(m))
    for h in range(min(2, len(d) - first)):
        error, n = total(errors, 8 * h, 8), first + h
        if best[h] < ZERO or error < best[h]:
            best[h], d[n], dmin[n] = error, sign * halves[0, 8 * h], sign * halves[1, 8 * h]
            for j in range(8):
                scs[n, j], ms[n, j] = i4(found_sc[8 * h + j]), i4(found_m[8 * h + j])


@jit
def fit_ranges(x, w, nmax, d, dmin, scs, ms):
    """d, dmin (n,), scs, ms (n, 8) int32. Two super-blocks fill the lanes."""
    xl, wl, value = np.empty((3, 32 * LANES), np.float32)
    values, halves = np.empty((2, 2, LANES), np.float32)
    best, sums = np.empty(2, np.float32), np.empty((5, LANES), np.float32)
    codes = np.empty(32 * LANES, np.uint8)
    for first in range(0, len(d), 2):
        to_lanes(x, 32, first * 8, xl)
        weights_to_lanes(w, 32, first * 8, wl)
        sum_w = splat(ZERO)
        for i in range(0, 32 * LANES, LANES):
            sum_w += load(wl, i)
        inv_w = inverse(sum_w)
        best[:] = f4(-1)
        for sign in (ONE, -ONE):
            for i in range(0, 32 * LANES, LANES):
                store(xl, i, sign * load(xl, i))
            scales, low = make_qkx_quants(xl, wl, 32, nmax, GRID, False, value, codes, 0)
            store(values[0], 0, scales)
            store(values[1], 0, -low)
            for trial in range(TRIALS):
                for k in range(2):
                    begin(values[k], _HIGHEST - RANGE_STEP * trial, halves[k])
                half, half_min = load(halves[0], 0), load(halves[1], 0)
                sc = within(nearest(scales * inverse(half)), 0, _HIGHEST)
                m = within(nearest(-low * inverse(half_min)), 0, _HIGHEST)
                for _ in range(ROUNDS):
                    half, half_min = load(halves[0], 0), load(halves[1], 0)
                    least, sc, m = search_around(xl, wl, inv_w, nmax, half, half_min, sc, m)
                    keep(least, halves, sc, m, sign, first, best, d, dmin, scs, ms)
                    range_refit(xl, wl, nmax, half, half_min, sc, m, sums, halves)
