"""ggml's searches for scales, compiled: those of `search.py`, for sixteen groups side by side.

A group is a lane: `x` and `w` hold (size, 16) numbers flattened, so that vector i is weight i of
each group, and each lane adds in ggml's order. Codes go to `codes` in the same layout, from
`codes[at]` on. Comments of `search.py` are not repeated here.
Source: ggml-quants.c, functions of the same names.
"""

from .numba_jit import ONE, ZERO, f4
from .numba_memory import load, store, store_bytes, transpose
from .numba_vector import LANES, floats, greater, helper, lesser, nearest, select, set_lanes, splat
from .search import MAX_EPS

_EPS, _STEP = f4(MAX_EPS), f4(0.1)
_ROUNDS = 5


@helper
def to_lanes(x, size, first, lanes):
    """lanes (size, 16) = groups `first` … of x (groups · size flattened); 0 beyond the last."""
    groups = min(LANES, len(x) // size - first)
    if groups == LANES and size % LANES == 0:
        for i in range(0, size, LANES):
            transpose(x, first * size + i, size, lanes, i * LANES)
        return
    lanes[:] = ZERO
    for j in range(groups):
        for i in range(size):
            lanes[i * LANES + j] = x[(first + j) * size + i]


@helper
def find_largest(x, size):
    """The first value of largest magnitude."""
    largest = splat(ZERO)
    for i in range(size):
        v = load(x, i * LANES)
        largest = select(abs(v) > abs(largest), v, largest)
    return largest


@helper
def signed_code(v, nmax):
    return lesser(greater(nearest(v), -nmax), nmax - 1)


@helper
def store_signed(x, size, nmax, inv, zero, codes, at):
    """Codes 0 … 2·nmax - 1 of x for the inverse scales."""
    for i in range(size):
        code = signed_code(inv * load(x, i * LANES), nmax) + nmax
        store_bytes(codes, at + i * LANES, select(zero, 0, code))


@helper
def symmetric_sums(x, w, size, nmax, inv):
    """The sums of w·x·code and w·code² for the codes that `inv` gives."""
    sumlx, suml2 = splat(ZERO), splat(ZERO)
    for i in range(size):
        v, weight = load(x, i * LANES), load(w, i * LANES)
        code = floats(signed_code(inv * v, nmax))
        sumlx += weight * v * code
        suml2 += weight * code * code
    return sumlx, suml2


@helper
def make_qx_quants(x, w, size, nmax, codes, at):
    """scale"""
    largest = find_largest(x, size)
    inv = -f4(nmax) / largest
    sumlx, suml2 = symmetric_sums(x, w, size, nmax, inv)
    scale = select(suml2 != ZERO, sumlx / suml2, ZERO)
    best = scale * sumlx
    for t in range(18):
        step = t - 9 if t < 9 else t - 8
        tried = -(f4(nmax) + _STEP * f4(step)) / largest
        sumlx, suml2 = symmetric_sums(x, w, size, nmax, tried)
        better = (suml2 > ZERO) & (sumlx * sumlx > best * suml2)
        scale = select(better, sumlx / suml2, scale)
        best = select(better, scale * sumlx, best)
        inv = select(better, tried, inv)
    zero = abs(largest) < _EPS
    store_signed(x, size, nmax, inv, zero, codes, at)
    return select(zero, ZERO, scale)


@helper
def make_q3_quants(x, size, nmax, value, codes, at):
    """scale, by moving one code at a time; `value` (size, 16) float32 is scratch."""
    largest = find_largest(x, size)
    inv = -f4(nmax) / largest
    sumlx, suml2 = splat(ZERO), splat(ZERO)
    for i in range(size):
        v = load(x, i * LANES)
        code = floats(signed_code(inv * v, nmax))
        store(value, i * LANES, code)
        sumlx += v * v * v * code
        suml2 += v * v * code * code
    for _ in range(_ROUNDS):
        moved = 0
        for i in range(size):
            v, code = load(x, i * LANES), load(value, i * LANES)
            weight = v * v
            slx, sl2 = sumlx - weight * v * code, suml2 - weight * code * code
            new = floats(signed_code(v * sl2 / slx, nmax))
            valid = (slx > ZERO) & (new != code)
            slx, sl2 = slx + weight * v * new, sl2 + weight * new * new
            better = valid & (sl2 > ZERO) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            store(value, i * LANES, select(better, new, code))
            sumlx, suml2 = select(better, slx, sumlx), select(better, sl2, suml2)
            moved |= set_lanes(better)
        if moved == 0:
            break
    zero = abs(largest) < _EPS
    for i in range(size):
        code = nearest(load(value, i * LANES)) + nmax
        store_bytes(codes, at + i * LANES, select(zero, 0, code))
    return select(~zero & (suml2 > ZERO), sumlx / suml2, ZERO)


@helper
def find_range(x, w, size):
    """The lowest, at most 0, the highest, and the sums of w and w·x."""
    low = high = load(x, 0)
    sum_w, sum_x = splat(ZERO), splat(ZERO)
    for i in range(size):
        v, weight = load(x, i * LANES), load(w, i * LANES)
        low, high = select(v < low, v, low), select(v > high, v, high)
        sum_w += weight
        sum_x += weight * v
    return select(low > ZERO, ZERO, low), high, sum_w, sum_x


@helper
def range_code(v, nmax):
    return lesser(greater(nearest(v), 0), nmax)


@helper
def range_error(x, w, size, use_mad, scale, low, value):
    error = splat(ZERO)
    for i in range(size):
        diff = scale * load(value, i * LANES) + low - load(x, i * LANES)
        error += load(w, i * LANES) * (abs(diff) if use_mad else diff * diff)
    return error


@helper
def range_sums(x, w, size, nmax, inv, low, value):
    """value = codes, and the sums of w·code, w·code², w·code·x."""
    sum_l, sum_l2, sum_xl = splat(ZERO), splat(ZERO), splat(ZERO)
    for i in range(size):
        v = load(x, i * LANES)
        code = floats(range_code(inv * (v - low), nmax))
        wl = load(w, i * LANES) * code
        store(value, i * LANES, code)
        sum_l += wl
        sum_l2 += wl * code
        sum_xl += wl * v
    return sum_l, sum_l2, sum_xl


@helper
def make_qkx_quants(x, w, size, nmax, grid, use_mad, value, codes, at):
    """scale, low (to be added); `value` is scratch."""
    rmin, rdelta, nstep = f4(grid[0]), f4(grid[1]), int(grid[2])
    lowest, high, sum_w, sum_x = find_range(x, w, size)
    low = code_low = lowest
    inv = f4(nmax) / (high - low)
    scale = ONE / inv
    range_sums(x, w, size, nmax, inv, low, value)
    best = range_error(x, w, size, use_mad, scale, low, value)
    for step in range(nstep + 1):
        tried = (rmin + rdelta * f4(step) + f4(nmax)) / (high - low)
        sum_l, sum_l2, sum_xl = range_sums(x, w, size, nmax, tried, low, value)
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        new_scale = select(new_low > ZERO, sum_xl / sum_l2, new_scale)
        new_low = select(new_low > ZERO, ZERO, new_low)
        error = range_error(x, w, size, use_mad, new_scale, new_low, value)
        better = (det > ZERO) & (error < best)
        best, inv = select(better, error, best), select(better, tried, inv)
        code_low = select(better, low, code_low)
        scale, low = select(better, new_scale, scale), select(better, new_low, low)
    flat = high == lowest
    for i in range(size):
        code = range_code(inv * (load(x, i * LANES) - code_low), nmax)
        store_bytes(codes, at + i * LANES, select(flat, 0, code))
    return select(flat, ZERO, scale), select(flat, lowest, low)


@helper
def fraction_error(x, w, size, inv, wraps, nmax):
    """Of codes for `inv`, bytes that wrap around or at most nmax."""
    error, scale = splat(ZERO), ONE / inv
    for i in range(size):
        v = load(x, i * LANES)
        code = nearest(inv * v)
        diff = v - scale * floats(code & 0xFF if wraps else lesser(code, nmax))
        error += load(w, i * LANES) * diff * diff
    return error


@helper
def make_qp_quants(x, w, size, nmax, value):
    """scale; `value` (size, 16) = codes as float32."""
    high = splat(ZERO)
    for i in range(size):
        v = load(x, i * LANES)
        high = select(high > v, high, v)
    inv = f4(nmax) / high
    best = fraction_error(x, w, size, inv, True, nmax)
    for t in range(8):
        step = t - 4 if t < 4 else t - 3
        tried = (_STEP * f4(step) + f4(nmax)) / high
        error = fraction_error(x, w, size, tried, False, nmax)
        better = error < best
        best, inv = select(better, error, best), select(better, tried, inv)
    sumlx, suml2 = splat(ZERO), splat(ZERO)
    for i in range(size):
        v, weight = load(x, i * LANES), load(w, i * LANES)
        code = lesser(nearest(inv * v), nmax)
        sumlx += weight * v * floats(code)
        suml2 += weight * floats(code) * floats(code)
        store(value, i * LANES, floats(code & 0xFF))
    sumlx, suml2 = descend(x, w, size, nmax, sumlx, suml2, value)
    zero = high < _EPS
    for i in range(size):
        store(value, i * LANES, select(zero, ZERO, load(value, i * LANES)))
    return select((suml2 > ZERO) & ~zero, sumlx / suml2, ZERO)


@helper
def descend(x, w, size, nmax, sumlx, suml2, value):
    for _ in range(_ROUNDS):
        moved = 0
        for i in range(size):
            v, weight, code = load(x, i * LANES), load(w, i * LANES), load(value, i * LANES)
            wx = weight * v
            slx, sl2 = sumlx - wx * code, suml2 - weight * code * code
            found = lesser(nearest(v * sl2 / slx), nmax)
            new = floats(found)
            valid = (slx > ZERO) & (sl2 > ZERO) & (new != code)
            slx, sl2 = slx + wx * new, sl2 + weight * new * new
            better = valid & (slx * slx * suml2 > sumlx * sumlx * sl2)
            store(value, i * LANES, select(better, floats(found & 0xFF), code))
            sumlx, suml2 = select(better, slx, sumlx), select(better, sl2, suml2)
            moved |= set_lanes(better)
        if moved == 0:
            break
    return sumlx, suml2
