"""ggml's searches for scales, compiled: those of `search.py`, for sixteen groups side by side.

Groups come as (size, 16) flattened arrays, `x` and `w`; numbers that each lane has for itself lie
in `s`, at the offsets below. Comments of `search.py` are not repeated here.
Source: ggml-quants.c, functions of the same names.
"""

from .numba_jit import LANES, ONE, ZERO, f4, i4, jit, nearest_int, u1
from .search import MAX_EPS

_EPS, _STEP = f4(MAX_EPS), f4(0.1)

# Offsets into `s`.
SCALE, LOW, _HIGH, _LARGEST, _INV, _CODE_INV, _CODE_LOW, _BEST = range(0, 8 * LANES, LANES)
_SUM_W, _SUM_X, _SUM_L, _SUM_L2, _SUM_XL = range(8 * LANES, 13 * LANES, LANES)
_NEW_SCALE, _NEW_LOW, _DET, _ERROR, _LOWEST = range(13 * LANES, 18 * LANES, LANES)
SCRATCH = 18 * LANES


@jit
def to_lanes(x, first, lanes):
    """lanes (size, 16) = sixteen rows of x (groups, size) from `first` on; 0 beyond the last."""
    size, groups = x.shape[1], min(LANES, len(x) - first)
    if groups < LANES:
        lanes[:] = ZERO
    for j in range(groups):
        for i in range(size):
            lanes[i * LANES + j] = x[first + j, i]


@jit
def find_largest(x, size, s):
    """s[_LARGEST] = the first value of largest magnitude."""
    for j in range(LANES):
        s[_LARGEST + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            v, largest = x[i * LANES + j], s[_LARGEST + j]
            s[_LARGEST + j] = v if abs(v) > abs(largest) else largest


@jit
def symmetric_sums(x, w, size, nmax, s):
    """s[_SUM_XL], s[_SUM_L2] for the codes that s[_INV] gives."""
    for j in range(LANES):
        s[_SUM_XL + j] = s[_SUM_L2 + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            v, weight = x[i * LANES + j], w[i * LANES + j]
            code = f4(min(max(nearest_int(s[_INV + j] * v), i4(-nmax)), i4(nmax - 1)))
            s[_SUM_XL + j] += weight * v * code
            s[_SUM_L2 + j] += weight * code * code


@jit
def make_qx_quants(x, w, size, nmax, s, codes):
    """s[SCALE], and codes (size, 16)."""
    find_largest(x, size, s)
    for t in range(19):
        step = 0 if t == 0 else t - 10 if t < 10 else t - 9
        for j in range(LANES):
            s[_INV + j] = -(f4(nmax) + _STEP * f4(step)) / s[_LARGEST + j]
        symmetric_sums(x, w, size, nmax, s)
        for j in range(LANES):
            sumlx, suml2 = s[_SUM_XL + j], s[_SUM_L2 + j]
            if t == 0:
                s[SCALE + j] = sumlx / suml2 if suml2 != ZERO else ZERO
            elif suml2 > ZERO and sumlx * sumlx > s[_BEST + j] * suml2:
                s[SCALE + j] = sumlx / suml2
            else:
                continue
            s[_BEST + j] = s[SCALE + j] * sumlx
            s[_CODE_INV + j] = s[_INV + j]
    for i in range(size):
        for j in range(LANES):
            code = min(
                max(nearest_int(s[_CODE_INV + j] * x[i * LANES + j]), i4(-nmax)), i4(nmax - 1)
            )
            codes[i * LANES + j] = u1(code + nmax) if abs(s[_LARGEST + j]) >= _EPS else u1(0)
    for j in range(LANES):
        s[SCALE + j] = s[SCALE + j] if abs(s[_LARGEST + j]) >= _EPS else ZERO


@jit
def make_q3_quants(x, size, nmax, s, value, codes):
    """As above, by moving one code at a time; `value` (size, 16) float32 is scratch."""
    find_largest(x, size, s)
    for j in range(LANES):
        s[_INV + j] = f4(-nmax) / s[_LARGEST + j]
        s[_SUM_XL + j] = s[_SUM_L2 + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            v = x[i * LANES + j]
            code = f4(min(max(nearest_int(s[_INV + j] * v), i4(-nmax)), i4(nmax - 1)))
            value[i * LANES + j] = code
            s[_SUM_XL + j] += v * v * v * code
            s[_SUM_L2 + j] += v * v * code * code
    for _ in range(5):
        moved = 0
        for i in range(size):
            for j in range(LANES):
                v, code = x[i * LANES + j], value[i * LANES + j]
                sumlx, suml2, weight = s[_SUM_XL + j], s[_SUM_L2 + j], v * v
                slx, sl2 = sumlx - weight * v * code, suml2 - weight * code * code
                new = f4(min(max(nearest_int(v * sl2 / slx), i4(-nmax)), i4(nmax - 1)))
                valid = (slx > ZERO) & (new != code)
                slx, sl2 = slx + weight * v * new, sl2 + weight * new * new
                better = valid & (sl2 > ZERO) & (slx * slx * suml2 > sumlx * sumlx * sl2)
                value[i * LANES + j] = new if better else code
                s[_SUM_XL + j] = slx if better else sumlx
                s[_SUM_L2 + j] = sl2 if better else suml2
                moved += better
        if moved == 0:
            break
    for i in range(size):
        for j in range(LANES):
            code = u1(i4(value[i * LANES + j]) + nmax)
            codes[i * LANES + j] = code if abs(s[_LARGEST + j]) >= _EPS else u1(0)
    for j in range(LANES):
        fits = (abs(s[_LARGEST + j]) >= _EPS) & (s[_SUM_L2 + j] > ZERO)
        s[SCALE + j] = s[_SUM_XL + j] / s[_SUM_L2 + j] if fits else ZERO


@jit
def find_range(x, w, size, s):
    """s[LOW], at most 0, s[_HIGH], and the sums of w and w·x."""
    for j in range(LANES):
        s[LOW + j] = s[_HIGH + j] = x[j]
        s[_SUM_W + j] = s[_SUM_X + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            v, weight = x[i * LANES + j], w[i * LANES + j]
            s[LOW + j] = v if v < s[LOW + j] else s[LOW + j]
            s[_HIGH + j] = v if v > s[_HIGH + j] else s[_HIGH + j]
            s[_SUM_W + j] += weight
            s[_SUM_X + j] += weight * v
    for j in range(LANES):
        s[LOW + j] = ZERO if s[LOW + j] > ZERO else s[LOW + j]


@jit
def range_codes(x, size, nmax, s, value):
    """value (size, 16) = codes for s[_INV], s[LOW]."""
    for i in range(size):
        for j in range(LANES):
            code = nearest_int(s[_INV + j] * (x[i * LANES + j] - s[LOW + j]))
            value[i * LANES + j] = f4(min(max(code, i4(0)), i4(nmax)))


@jit
def range_error(x, w, size, use_mad, s, value):
    """s[_ERROR] of s[_NEW_SCALE], s[_NEW_LOW]."""
    for j in range(LANES):
        s[_ERROR + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            k = i * LANES + j
            diff = s[_NEW_SCALE + j] * value[k] + s[_NEW_LOW + j] - x[k]
            s[_ERROR + j] += w[k] * (abs(diff) if use_mad else diff * diff)


@jit
def range_fit(x, w, size, s, value):
    """s[_NEW_SCALE], s[_NEW_LOW], s[_DET]: weighted least squares for the codes `value`."""
    for j in range(LANES):
        s[_SUM_L + j] = s[_SUM_L2 + j] = s[_SUM_XL + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            k = i * LANES + j
            wl = w[k] * value[k]
            s[_SUM_L + j] += wl
            s[_SUM_L2 + j] += wl * value[k]
            s[_SUM_XL + j] += wl * x[k]
    for j in range(LANES):
        sum_w, sum_x, sum_l = s[_SUM_W + j], s[_SUM_X + j], s[_SUM_L + j]
        sum_l2, sum_xl = s[_SUM_L2 + j], s[_SUM_XL + j]
        det = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / det
        low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        s[_DET + j] = det
        s[_NEW_SCALE + j] = sum_xl / sum_l2 if low > ZERO else scale
        s[_NEW_LOW + j] = ZERO if low > ZERO else low


@jit
def make_qkx_quants(x, w, size, nmax, grid, use_mad, s, value, codes):
    """s[SCALE], s[LOW] (to be added), and codes (size, 16); `value` is scratch."""
    rmin, rdelta, nstep = f4(grid[0]), f4(grid[1]), int(grid[2])
    find_range(x, w, size, s)
    for j in range(LANES):
        s[_INV + j] = f4(nmax) / (s[_HIGH + j] - s[LOW + j])
        s[SCALE + j] = s[_NEW_SCALE + j] = ONE / s[_INV + j]
        s[_NEW_LOW + j] = s[_CODE_LOW + j] = s[_LOWEST + j] = s[LOW + j]
        s[_CODE_INV + j] = s[_INV + j]
    range_codes(x, size, nmax, s, value)
    range_error(x, w, size, use_mad, s, value)
    for j in range(LANES):
        s[_BEST + j] = s[_ERROR + j]
    for step in range(nstep + 1):
        for j in range(LANES):
            steps = rmin + rdelta * f4(step) + f4(nmax)
            s[_INV + j] = steps / (s[_HIGH + j] - s[LOW + j])
        range_codes(x, size, nmax, s, value)
        range_fit(x, w, size, s, value)
        range_error(x, w, size, use_mad, s, value)
        for j in range(LANES):
            better = (s[_DET + j] > ZERO) & (s[_ERROR + j] < s[_BEST + j])
            s[_BEST + j] = s[_ERROR + j] if better else s[_BEST + j]
            s[_CODE_INV + j] = s[_INV + j] if better else s[_CODE_INV + j]
            s[_CODE_LOW + j] = s[LOW + j] if better else s[_CODE_LOW + j]
            s[SCALE + j] = s[_NEW_SCALE + j] if better else s[SCALE + j]
            s[LOW + j] = s[_NEW_LOW + j] if better else s[LOW + j]
    for i in range(size):
        for j in range(LANES):
            v = x[i * LANES + j] - s[_CODE_LOW + j]
            code = min(max(nearest_int(s[_CODE_INV + j] * v), i4(0)), i4(nmax))
            codes[i * LANES + j] = u1(code) if s[_HIGH + j] != s[_LOWEST + j] else u1(0)
    for j in range(LANES):
        flat = s[_HIGH + j] == s[_LOWEST + j]
        s[SCALE + j] = ZERO if flat else s[SCALE + j]
        s[LOW + j] = s[_LOWEST + j] if flat else s[LOW + j]


@jit
def make_qp_quants(x, w, size, nmax, s, codes):
    """s[SCALE], and codes (size, 16) int32."""
    for j in range(LANES):
        s[_HIGH + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            v = x[i * LANES + j]
            s[_HIGH + j] = s[_HIGH + j] if s[_HIGH + j] > v else v
    for t in range(9):
        step = 0 if t == 0 else t - 5 if t < 5 else t - 4
        for j in range(LANES):
            s[_INV + j] = (_STEP * f4(step) + f4(nmax)) / s[_HIGH + j]
            s[_NEW_SCALE + j] = ONE / s[_INV + j]
            s[_ERROR + j] = ZERO
        for i in range(size):
            for j in range(LANES):
                k = i * LANES + j
                code = nearest_int(s[_INV + j] * x[k])
                code = code & i4(0xFF) if t == 0 else min(code, i4(nmax))
                diff = x[k] - s[_NEW_SCALE + j] * f4(code)
                s[_ERROR + j] += w[k] * diff * diff
        for j in range(LANES):
            if t == 0 or s[_ERROR + j] < s[_BEST + j]:
                s[_BEST + j], s[_CODE_INV + j] = s[_ERROR + j], s[_INV + j]
    for j in range(LANES):
        s[_SUM_XL + j] = s[_SUM_L2 + j] = ZERO
    for i in range(size):
        for j in range(LANES):
            k = i * LANES + j
            code = min(nearest_int(s[_CODE_INV + j] * x[k]), i4(nmax))
            s[_SUM_XL + j] += w[k] * x[k] * f4(code)
            s[_SUM_L2 + j] += w[k] * f4(code) * f4(code)
            codes[k] = code & i4(0xFF)
    descend(x, w, size, nmax, s, codes)
    for j in range(LANES):
        fits = (s[_SUM_L2 + j] > ZERO) & ~(s[_HIGH + j] < _EPS)
        s[SCALE + j] = s[_SUM_XL + j] / s[_SUM_L2 + j] if fits else ZERO
        if s[_HIGH + j] < _EPS:
            for i in range(size):
                codes[i * LANES + j] = 0


@jit
def descend(x, w, size, nmax, s, codes):
    for _ in range(5):
        moved = 0
        for i in range(size):
            for j in range(LANES):
                k = i * LANES + j
                sumlx, suml2, wx, code = s[_SUM_XL + j], s[_SUM_L2 + j], w[k] * x[k], f4(codes[k])
                slx, sl2 = sumlx - wx * code, suml2 - w[k] * code * code
                new = min(nearest_int(x[k] * sl2 / slx), i4(nmax))
                valid = (slx > ZERO) & (sl2 > ZERO) & (f4(new) != code)
                slx, sl2 = slx + wx * f4(new), sl2 + w[k] * f4(new) * f4(new)
                better = valid & (slx * slx * suml2 > sumlx * sumlx * sl2)
                codes[k] = new & i4(0xFF) if better else codes[k]
                s[_SUM_XL + j] = slx if better else sumlx
                s[_SUM_L2 + j] = sl2 if better else suml2
                moved += better
        if moved == 0:
            break
