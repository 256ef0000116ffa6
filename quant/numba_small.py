"""Kernels that write blocks of 32 without a search, as `legacy.py` and `microscaling.py` do.

`x` is (n, 32) float32, `out` (n, type_size) uint8. Also the packing of what a search has found.
"""

import math

import numpy as np
from gguf.quants import MXFP4

from .numba_jit import ONE, ZERO, f4, i4, jit, store_half, truncate, u1

_E2M1 = tuple(f4(value) for value in MXFP4.kvalues)
_INF, _HALF = f4(np.inf), f4(0.5)


@jit
def amax_bits(x):
    """The largest |x|; as integers, since compilers keep the order of comparisons of floats."""
    bits, largest = x.view(np.int32), i4(0)
    for i in range(len(bits)):
        size = bits[i] & i4(0x7FFFFFFF)
        largest = max(largest, size)
    return i4(largest).view(np.float32)


@jit
def signed_amax(x):
    amax = amax_bits(x)
    for v in x:
        if abs(v) == amax:
            return v
    return ZERO


@jit
def reciprocal(d):
    return ONE / d if d != ZERO else ZERO


@jit
def pack_nibbles(codes, qs):
    for i in range(16):
        qs[i] = u1((codes[i] & 15) | ((codes[i + 16] & 15) << 4))


@jit
def pack_codes(codes, qs):
    """32 codes of four bits, or of five where there are 20 bytes for them."""
    if len(qs) == 20:
        for k in range(4):
            byte = 0
            for i in range(8):
                byte |= (codes[8 * k + i] >> 4) << i
            qs[k] = u1(byte)
    pack_nibbles(codes, qs[len(qs) - 16 :])


@jit
def quantize_symmetric(x, nmax, out):
    """Q4_0, Q5_0"""
    codes, shift, top = np.empty(32, np.uint8), f4(nmax + 0.5), i4(2 * nmax - 1)
    for b in range(len(x)):
        d = signed_amax(x[b]) / f4(-nmax)
        inv_d = reciprocal(d)
        store_half(out[b], 0, d)
        for i in range(32):
            codes[i] = u1(min(truncate(x[b, i] * inv_d + shift), top))
        pack_codes(codes, out[b, 2:])


@jit
def quantize_with_minimum(x, nmax, out):
    """Q4_1, Q5_1"""
    codes = np.empty(32, np.uint8)
    for b in range(len(x)):
        low = high = x[b, 0]
        for v in x[b]:
            low = v if v < low else low
            high = v if v > high else high
        d = (high - low) / f4(nmax)
        inv_d = reciprocal(d)
        store_half(out[b], 0, d)
        store_half(out[b], 2, low)
        for i in range(32):
            codes[i] = u1(min(truncate((x[b, i] - low) * inv_d + _HALF), i4(nmax)))
        pack_codes(codes, out[b, 4:])


@jit
def pack_found(d, mins, codes, out):
    """Blocks of what a search has found; `mins`, to be subtracted, may be empty."""
    for b in range(len(codes)):
        store_half(out[b], 0, d[b])
        if len(mins):
            store_half(out[b], 2, -mins[b])
        pack_codes(codes[b], out[b, 4 if len(mins) else 2 :])


@jit
def quantize_q8_0(x, out):
    for b in range(len(x)):
        d = amax_bits(x[b]) / f4(127)
        inv_d = reciprocal(d)
        store_half(out[b], 0, d)
        for i in range(32):
            v = x[b, i] * inv_d
            v = v if abs(v) < _INF else ZERO
            whole = np.trunc(v)
            away = ONE if v > ZERO else -ONE
            whole += away if abs(v - whole) >= _HALF else ZERO
            out[b, 2 + i] = u1(i4(whole) & 0xFF)


@jit
def quantize_mxfp4(x, out):
    codes = np.empty(32, np.uint8)
    for b in range(len(x)):
        amax, e = amax_bits(x[b]), 0
        if amax > ZERO:
            e = (math.floor(f4(math.log2(np.float64(amax)))) + 125) & 0xFF
        scale = i4(0x00200000 << e if e < 2 else (e - 1) << 23).view(np.float32)
        for i in range(32):
            v = x[b, i]
            best, code = abs(v), u1(0)
            for k in range(1, 16):
                error = abs(_E2M1[k] * scale - v)
                code = u1(k) if error < best else code
                best = error if error < best else best
            codes[i] = code
        out[b, 0] = u1(e)
        pack_nibbles(codes, out[b, 1:])
