"""Kernels that quantise the scales found, fit the codes to them, and write a K-quant's bytes.

`x` is (n, 256) float32 and `codes`, the searched ones, uint8 like it; they are overwritten. `d` and
`dmin` are (n,), `sc` and `m` (n, sub-blocks) int32, `out` (n, type_size). Layouts are in `k.py`.
"""

from .numba_jit import ZERO, f4, i4, jit, nearest_int, store_half, u1
from .search import MAX_EPS

_EPS = f4(MAX_EPS)


@jit
def requantize(x, d, dm, low, high, codes):
    """Codes of a sub-block for its quantised scale and minimum; they stay where d is zero."""
    if d == ZERO:
        return
    for i in range(len(x)):
        code = nearest_int((x[i] + dm) / d)
        codes[i] = u1(min(max(code, i4(low)), i4(high)) - low)


@jit
def pack_2_bits(codes, out):
    """256 codes -> 64 bytes."""
    for h in range(2):
        for i in range(32):
            k = h * 128 + i
            low = (codes[k] & 3) | ((codes[k + 32] & 3) << 2)
            out[h * 32 + i] = u1(low | ((codes[k + 64] & 3) << 4) | ((codes[k + 96] & 3) << 6))


@jit
def pack_high_bits(codes, shift, out):
    """256 codes -> 32 bytes: bit j of byte i belongs to weight 32j + i."""
    for i in range(32):
        byte = 0
        for j in range(8):
            byte |= ((codes[32 * j + i] >> shift) & 1) << j
        out[i] = u1(byte)


@jit
def pack_q2_k(x, d, dmin, sc, m, codes, out):
    for b in range(len(x)):
        block, q = out[b], codes[b]
        scale, low = store_half(block, 80, d[b]), store_half(block, 82, dmin[b])
        for i in range(16):
            byte = (sc[b, i] | (m[b, i] << 4)) & 0xFF
            block[i] = u1(byte)
            part = slice(i * 16, i * 16 + 16)
            requantize(x[b, part], scale * f4(byte & 15), low * f4(byte >> 4), 0, 3, q[part])
        pack_2_bits(q, block[16:80])


@jit
def pack_q3_k(x, d, sc, codes, out):
    for b in range(len(x)):
        block, q = out[b], codes[b]
        scale = store_half(block, 108, d[b])
        block[96:108] = u1(0)
        for i in range(16):
            code = sc[b, i]
            block[96 + i % 8] |= u1((code & 15) << (4 * (i // 8)))
            block[104 + i % 4] |= u1((code >> 4) << (2 * (i // 4)))
            part = slice(i * 16, i * 16 + 16)
            requantize(x[b, part], scale * f4(code - 32), ZERO, -4, 3, q[part])
        pack_high_bits(q, 2, block[:32])
        pack_2_bits(q, block[32:96])


@jit
def store_scale_min(block, sc, m):
    """Eight scales and minima -> bytes 4 … 15."""
    for i in range(4):
        block[4 + i] = u1((sc[i] | ((sc[i + 4] >> 4) << 6)) & 0xFF)
        block[8 + i] = u1((m[i] | ((m[i + 4] >> 4) << 6)) & 0xFF)
        block[12 + i] = u1((sc[i + 4] & 15) | ((m[i + 4] & 15) << 4))


@jit
def load_scale_min(block, i):
    """The inverse, for sub-block i."""
    if i < 4:
        return block[4 + i] & 63, block[8 + i] & 63
    sc = (block[8 + i] & 15) | ((block[i] >> 6) << 4)
    return sc, (block[8 + i] >> 4) | ((block[4 + i] >> 6) << 4)


@jit
def pack_q4_or_q5_k(x, d, dmin, sc, m, codes, out):
    """Both have the same first 16 bytes; Q5_K (176 bytes) then has 32 of high bits."""
    five_bits = out.shape[1] == 176
    for b in range(len(x)):
        block, q = out[b], codes[b]
        scale, low = store_half(block, 0, d[b]), store_half(block, 2, dmin[b])
        store_scale_min(block, sc[b], m[b])
        for i in range(8):
            dl, ml = load_scale_min(block, i)
            part = slice(i * 32, i * 32 + 32)
            nmax = 31 if five_bits else 15
            requantize(x[b, part], scale * f4(dl), low * f4(ml), 0, nmax, q[part])
        if five_bits:
            pack_high_bits(q, 4, block[16:48])
        qs = block[len(block) - 128 :]
        for h in range(4):
            for i in range(32):
                k = h * 64 + i
                qs[h * 32 + i] = u1((q[k] & 15) | ((q[k + 32] & 15) << 4))


@jit
def pack_6_bits(q, block):
    for h in range(2):
        for i in range(64):
            k = h * 128 + i
            block[h * 64 + i] = u1((q[k] & 15) | ((q[k + 64] & 15) << 4))
        for i in range(32):
            k = h * 128 + i
            low = (q[k] >> 4) | ((q[k + 32] >> 4) << 2)
            high = ((q[k + 64] >> 4) << 4) | ((q[k + 96] >> 4) << 6)
            block[128 + h * 32 + i] = u1(low | high)


@jit
def pack_q6_k(x, scales, codes, out):
    """scales: (n, 16) float32, not yet quantised."""
    for b in range(len(x)):
        block, q = out[b], codes[b]
        largest = ZERO
        for v in scales[b]:
            largest = v if abs(v) > abs(largest) else largest
        if abs(largest) < _EPS:
            block[:] = u1(0)
            continue
        inv = f4(-128) / largest
        scale = store_half(block, 208, f4(1) / inv)
        for i in range(16):
            code = min(nearest_int(inv * scales[b, i]), i4(127)) & 0xFF
            block[192 + i] = u1(code)
            part = slice(i * 16, i * 16 + 16)
            signed = code - 256 if code > 127 else code
            requantize(x[b, part], scale * f4(signed), ZERO, -32, 31, q[part])
        pack_6_bits(q, block)
