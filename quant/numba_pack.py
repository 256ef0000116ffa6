"""Kernels that quantise the scales found, fit the codes to them, and write a K-quant's bytes.

`x` is n · 256 float32, flattened; `codes` are the searched ones as `numba_groups` leaves them. `d`
and `dmin` are (n,), `sc` and `m` (n, sub-blocks) int32, `out` (n, type_size). Layouts: `k.py`.
"""

import numpy as np

from .numba_jit import ZERO, f4, jit, store_half, u1
from .numba_memory import load, load_bytes, store_bytes
from .numba_vector import LANES, greater, helper, lesser, nearest


@helper
def searched(codes, size, group, q, at):
    """q[at :] = the codes of one group."""
    first = group // LANES * size * LANES + group % LANES
    for i in range(size):
        q[at + i] = codes[first + i * LANES]


@helper
def requantize(x, codes, size, group, d, dm, low, high, q):
    """Codes of a sub-block for its quantised scale and minimum; those searched if d is zero."""
    first = group * size
    at = first % 256
    if d == ZERO:
        searched(codes, size, group, q, at)
        return
    for i in range(0, size, LANES):
        code = nearest((load(x, first + i) + dm) / d)
        store_bytes(q, at + i, lesser(greater(code, low), high) - low)


@helper
def pack_2_bits(codes, out):
    """256 codes, of which the low two bits count -> 64 bytes."""
    for h in range(2):
        for i in range(0, 32, LANES):
            k, packed = h * 128 + i, load_bytes(codes, h * 128 + i) & 3
            for part in range(1, 4):
                packed |= (load_bytes(codes, k + 32 * part) & 3) << 2 * part
            store_bytes(out, h * 32 + i, packed)


@helper
def pack_high_bits(codes, shift, out):
    """256 codes -> 32 bytes: bit j of byte i belongs to weight 32j + i."""
    for i in range(0, 32, LANES):
        packed = (load_bytes(codes, i) >> shift) & 1
        for j in range(1, 8):
            packed |= ((load_bytes(codes, 32 * j + i) >> shift) & 1) << j
        store_bytes(out, i, packed)


@helper
def pack_low_nibbles(codes, distance, out):
    """256 codes -> 128 bytes: the low nibbles of runs of `distance`, two runs in each byte."""
    for k in range(0, 128, LANES):
        place = k // distance * distance + k
        low, high = load_bytes(codes, place) & 15, load_bytes(codes, place + distance) & 15
        store_bytes(out, k, low | (high << 4))


@jit
def pack_q2_k(x, d, dmin, sc, m, codes, out):
    q = np.empty(256, np.uint8)
    for b in range(len(out)):
        block = out[b]
        scale, low = store_half(block, 80, d[b]), store_half(block, 82, dmin[b])
        for i in range(16):
            byte = (sc[b, i] | (m[b, i] << 4)) & 0xFF
            block[i] = u1(byte)
            dl, ml = scale * f4(byte & 15), low * f4(byte >> 4)
            requantize(x, codes, 16, b * 16 + i, dl, ml, 0, 3, q)
        pack_2_bits(q, block[16:80])


@jit
def pack_q3_k(x, d, sc, codes, out):
    q = np.empty(256, np.uint8)
    for b in range(len(out)):
        block = out[b]
        scale = store_half(block, 108, d[b])
        block[96:108] = u1(0)
        for i in range(16):
            code = sc[b, i]
            block[96 + i % 8] |= u1((code & 15) << (4 * (i // 8)))
            block[104 + i % 4] |= u1((code >> 4) << (2 * (i // 4)))
            requantize(x, codes, 16, b * 16 + i, scale * f4(code - 32), ZERO, -4, 3, q)
        pack_high_bits(q, 2, block[:32])
        pack_2_bits(q, block[32:96])


@helper
def store_scale_min(block, sc, m):
    """Eight scales and minima -> bytes 4 … 15."""
    for i in range(4):
        block[4 + i] = u1((sc[i] | ((sc[i + 4] >> 4) << 6)) & 0xFF)
        block[8 + i] = u1((m[i] | ((m[i + 4] >> 4) << 6)) & 0xFF)
        block[12 + i] = u1((sc[i + 4] & 15) | ((m[i + 4] & 15) << 4))


@helper
def load_scale_min(block, i):
    """The inverse, for sub-block i."""
    if i < 4:
        return block[4 + i] & 63, block[8 + i] & 63
    sc = (block[8 + i] & 15) | ((block[i] >> 6) << 4)
    return sc, (block[8 + i] >> 4) | ((block[4 + i] >> 6) << 4)


@jit
def pack_q4_or_q5_k(x, d, dmin, sc, m, codes, out):
    """Both have the same first 16 bytes; Q5_K (176 bytes) then has 32 of high bits."""
    five_bits, q = out.shape[1] == 176, np.empty(256, np.uint8)
    nmax = 31 if five_bits else 15
    for b in range(len(out)):
        block = out[b]
        scale, low = store_half(block, 0, d[b]), store_half(block, 2, dmin[b])
        store_scale_min(block, sc[b], m[b])
        for i in range(8):
            dl, ml = load_scale_min(block, i)
            requantize(x, codes, 32, b * 8 + i, scale * f4(dl), low * f4(ml), 0, nmax, q)
        if five_bits:
            pack_high_bits(q, 4, block[16:48])
        pack_low_nibbles(q, 32, block[len(block) - 128 :])


@helper
def pack_6_bits(q, block):
    pack_low_nibbles(q, 64, block[:128])
    for h in range(2):
        for i in range(0, 32, LANES):
            k, packed = h * 128 + i, load_bytes(q, h * 128 + i) >> 4
            for part in range(1, 4):
                packed |= (load_bytes(q, k + 32 * part) >> 4) << 2 * part
            store_bytes(block, 128 + h * 32 + i, packed)


@jit
def pack_q6_k(x, d, sc, codes, out):
    """Zeros where d is zero."""
    q = np.empty(256, np.uint8)
    for b in range(len(out)):
        block = out[b]
        if d[b] == ZERO:
            block[:] = u1(0)
            continue
        scale = store_half(block, 208, d[b])
        for i in range(16):
            code = sc[b, i] & 0xFF
            block[192 + i] = u1(code)
            signed = code - 256 if code > 127 else code
            requantize(x, codes, 16, b * 16 + i, scale * f4(signed), ZERO, -32, 31, q)
        pack_6_bits(q, block)
