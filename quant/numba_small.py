"""Kernels that write blocks of 32 without a search, as `legacy.py` and `microscaling.py` do.

`x` is n · 32 float32, flattened, `out` (n, type_size) uint8. Also the packing of what a search has
found. A block is two vectors.
"""

import math
from itertools import pairwise

import numpy as np
from gguf.quants import MXFP4

from .numba_jit import ONE, TOO_LARGE, ZERO, f4, i4, jit, store_half, u1
from .numba_measure import all_finite
from .numba_memory import load, load_bytes, store_bytes
from .numba_vector import (
    LANES,
    biggest_lane,
    bits_of,
    first_of,
    floats,
    greater,
    helper,
    largest_lane,
    lesser,
    select,
    set_lanes,
    smallest_lane,
    truncated,
)

_VALUES = [float(value) for value in MXFP4.kvalues[:8]]  # E2M1's, doubled
_E2M1 = tuple(f4(value) for value in MXFP4.kvalues)
_EDGES = tuple(f4((a + b) / 2) for a, b in pairwise(_VALUES))
_INF, _HALF = f4(np.inf), f4(0.5)
_PIECE = 2**12  # weights that stay in the first cache


@helper
def amax_of(a, b):
    """The largest |x| of two vectors; as integers, whose order is that of the floats."""
    return i4(largest_lane(greater(bits_of(abs(a)), bits_of(abs(b))))).view(np.float32)


@helper
def reciprocal(d):
    return ONE / d if d != ZERO else ZERO


@helper
def truncate(v):
    """int32, as `rounding.truncate`."""
    return truncated(select(abs(v) < TOO_LARGE, v, ZERO))


@helper
def pack_codes(low, high, qs):
    """Codes of a block's halves, of four bits, or of five where there are 20 bytes for them."""
    if len(qs) == 20:
        fifth = set_lanes((low & 16) > 0) | (set_lanes((high & 16) > 0) << 16)
        for k in range(4):
            qs[k] = u1((fifth >> (8 * k)) & 0xFF)
    store_bytes(qs, len(qs) - 16, (low & 15) | ((high & 15) << 4))


@jit
def quantize_symmetric(x, nmax, out):
    """Q4_0, Q5_0"""
    shift, top = f4(nmax + 0.5), i4(2 * nmax - 1)
    for b in range(len(out)):
        low, high = load(x, b * 32), load(x, b * 32 + LANES)
        amax = amax_of(low, high)
        d = x[b * 32 + first_of(abs(low) == amax, abs(high) == amax)] / f4(-nmax)
        inv_d = reciprocal(d)
        store_half(out[b], 0, d)
        low, high = truncate(low * inv_d + shift), truncate(high * inv_d + shift)
        pack_codes(lesser(low, top), lesser(high, top), out[b, 2:])


@jit
def quantize_with_minimum(x, nmax, out):
    """Q4_1, Q5_1"""
    for b in range(len(out)):
        low, high = load(x, b * 32), load(x, b * 32 + LANES)
        vmin = smallest_lane(select(low < high, low, high))
        vmin = x[b * 32 + first_of(low == vmin, high == vmin)]  # of zeros of either sign, the first
        d = (biggest_lane(select(low > high, low, high)) - vmin) / f4(nmax)
        inv_d = reciprocal(d)
        store_half(out[b], 0, d)
        store_half(out[b], 2, vmin)
        low, high = truncate((low - vmin) * inv_d + _HALF), truncate((high - vmin) * inv_d + _HALF)
        pack_codes(lesser(low, nmax), lesser(high, nmax), out[b, 4:])


@jit
def pack_found(d, mins, codes, out):
    """Blocks of what a search has found; `mins`, to be subtracted, may be empty."""
    q = np.empty(32, np.uint8)
    for b in range(len(out)):
        store_half(out[b], 0, d[b])
        if len(mins):
            store_half(out[b], 2, -mins[b])
        first = b // LANES * 32 * LANES + b % LANES
        for i in range(32):
            q[i] = codes[first + i * LANES]
        low, high = load_bytes(q, 0), load_bytes(q, LANES)
        pack_codes(low, high, out[b, 4 if len(mins) else 2 :])


@jit
def quantize_bf16(x, out):
    """Half to even, into uint16; False, and the rest undone, at NaN or infinity."""
    for start in range(0, len(x), _PIECE):
        piece, halves = x[start : start + _PIECE], out[start : start + _PIECE]
        if not all_finite(piece):
            return False
        bits = piece.view(np.uint32)
        for i in range(len(bits)):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            halves[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    return True


@jit
def quantize_q8_0(x, out):
    for b in range(len(out)):
        low, high = load(x, b * 32), load(x, b * 32 + LANES)
        d = amax_of(low, high) / f4(127)
        inv_d = reciprocal(d)
        store_half(out[b], 0, d)
        store_bytes(out[b], 2, round_half_away(low * inv_d))
        store_bytes(out[b], 2 + LANES, round_half_away(high * inv_d))


@helper
def round_half_away(v):
    """int32: as `rounding.round_half_away` for what is not too large; 0 for infinity and NaN."""
    v = select(abs(v) < _INF, v, ZERO)
    whole = truncated(v)
    away = select(v > ZERO, 1, -1)
    return select(abs(v - floats(whole)) >= _HALF, whole + away, whole)


@jit
def quantize_mxfp4(x, out):
    for b in range(len(out)):
        low, high = load(x, b * 32), load(x, b * 32 + LANES)
        amax, e = amax_of(low, high), 0
        if amax > ZERO:
            e = (math.floor(f4(math.log2(np.float64(amax)))) + 125) & 0xFF
        scale = i4(0x00200000 << e if e < 2 else (e - 1) << 23).view(np.float32)
        out[b, 0] = u1(e)
        pack_codes(e2m1_index(low, scale), e2m1_index(high, scale), out[b, 1:])


@helper
def e2m1_index(v, scale):
    """The E2M1 value nearest to v / scale, of two as near the first in ggml's table."""
    code = bits_of(v) & 0
    for edge in _EDGES:
        code += select(abs(v) > edge * scale, 1, 0)
    return select((v < ZERO) & (code > 0), code + 8, code)


@helper
def e2m1_index_far(v, scale):
    """The same where v is so far off that errors are rounded alike: the first of the least."""
    best, code = abs(v), bits_of(v) & 0
    for k in range(16):
        error = abs(_E2M1[k] * scale - v)
        code, best = select(error < best, k, code), select(error < best, error, best)
    return code


@helper
def to_ue4m3(v):
    """As `microscaling._to_ue4m3`, and half the value of the code."""
    word = f4(v).view(i4)
    exponent = (word >> 23) - 127 + 7
    code = (exponent << 3 | ((word >> 20) & 7)) + ((word >> 19) & 1)
    if exponent <= 0:
        code = min(int(v * f4(512) + _HALF), 7)
    code = 0x7E if code >= 15 << 3 else code
    if code >> 3 == 0:
        return code, f4(code & 7) * f4(2.0**-10)
    return code, i4(((code >> 3) + 119) << 23 | (code & 7) << 20).view(np.float32)


@jit
def quantize_nvfp4(x, out):
    q = np.empty(LANES, np.uint8)
    for b in range(len(out)):
        for i in range(4):
            v = load(x, b * 64 + i * LANES)
            amax = amax_of(v, v)
            code, scale = to_ue4m3(amax / f4(6))
            out[b, i] = u1(code)
            near = amax <= f4(16) * scale
            store_bytes(q, 0, e2m1_index(v, scale) if near else e2m1_index_far(v, scale))
            for k in range(8):
                out[b, 4 + 8 * i + k] = q[k] | (q[k + 8] << 4)
