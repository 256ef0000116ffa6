"""Blocks of each quantised type to floats, for CPUs: one pass, in registers, sixteen at a time.

The bits of each type are drawn where its torch formulation stands (legacy.py, k.py, iq.py,
ternary.py, microscaling.py), and names are as there. A kernel takes whole blocks as a run of uint8;
`out`, as `put` takes it; and the rows of its codebook as int64, if it has one.
`at` is where a block starts, `to` where its weights go.
"""

import numpy as np
import torch
from gguf.quants import IQ4_NL, MXFP4

from .microscaling import e8m0_half, ue4m3_half
from .numba_bytes import (
    block,
    half,
    join,
    lanes_of,
    load_signed,
    long,
    look_up,
    put,
    put_subnormal,
    short,
    word,
)
from .numba_jit import f4, half_value, jit
from .numba_memory import load_bytes
from .numba_vector import floats, helper, select, splat

# The same bits of four bytes, or of eight.
_NIBBLES, _SIXES, _TOPS, _PAIRS = 0x0F0F0F0F, 0x3F3F3F3F, 0x30303030, 0x03030303
_EIGHT_NIBBLES = 0x0F0F0F0F0F0F0F0F
_BYTE_VALUES = torch.arange(256, dtype=torch.uint8)
_E8M0, _UE4M3 = e8m0_half(_BYTE_VALUES).numpy(), ue4m3_half(_BYTE_VALUES).numpy()
_EVEN_SIGNS = np.array([i | (i.bit_count() & 1) << 7 for i in range(128)])  # ksigns
_uneven, _e2m1 = look_up(IQ4_NL.kvalues), look_up(MXFP4.kvalues)


@jit
def q8_0(data, out):
    for b in range(len(out) // 32):
        at, to = block(data, b, 34, 32)
        d = half(data, at)
        put(out, to, floats(load_signed(data, at + 2)) * d)
        put(out, to + 16, floats(load_signed(data, at + 18)) * d)


@jit
def q4_0(data, out):
    for b in range(len(out) // 32):
        at, to = block(data, b, 18, 32)
        d, q = half(data, at), load_bytes(data, at + 2)
        put(out, to, floats((q & 15) - 8) * d)
        put(out, to + 16, floats((q >> 4) - 8) * d)


@jit
def q4_1(data, out):
    for b in range(len(out) // 32):
        at, to = block(data, b, 20, 32)
        d, m, q = half(data, at), half(data, at + 2), load_bytes(data, at + 4)
        put(out, to, floats(q & 15) * d + m)
        put(out, to + 16, floats(q >> 4) * d + m)


@jit
def q5_0(data, out):
    for b in range(len(out) // 32):
        at, to = block(data, b, 22, 32)
        d, qh, q = half(data, at), word(data, at + 2), load_bytes(data, at + 6)
        put(out, to, floats((q & 15) + select(lanes_of(qh), 0, -16)) * d)
        put(out, to + 16, floats((q >> 4) + select(lanes_of(qh >> 16), 0, -16)) * d)


@jit
def q5_1(data, out):
    for b in range(len(out) // 32):
        at, to = block(data, b, 24, 32)
        d, m, qh, q = (
            half(data, at),
            half(data, at + 2),
            word(data, at + 4),
            load_bytes(data, at + 8),
        )
        put(out, to, floats((q & 15) + select(lanes_of(qh), 16, 0)) * d + m)
        put(out, to + 16, floats((q >> 4) + select(lanes_of(qh >> 16), 16, 0)) * d + m)


@jit
def iq4_nl(data, out):
    for b in range(len(out) // 32):
        at, to = block(data, b, 18, 32)
        d, q = half(data, at), load_bytes(data, at + 2)
        put(out, to, floats(_uneven(q & 15)) * d)
        put(out, to + 16, floats(_uneven(q >> 4)) * d)


@jit
def mxfp4(data, out):
    for b in range(len(out) // 32):
        at, to = block(data, b, 17, 32)
        d, q = _E8M0[data[at]], load_bytes(data, at + 1)
        put_subnormal(out, to, floats(_e2m1(q & 15)) * d)
        put_subnormal(out, to + 16, floats(_e2m1(q >> 4)) * d)


@jit
def nvfp4(data, out):
    for b in range(len(out) // 64):
        at, to = block(data, b, 36, 64)
        for part in range(4):
            q = long(data, at + 4 + 8 * part)
            q = join(q & _EIGHT_NIBBLES, (q >> 4) & _EIGHT_NIBBLES)
            put(out, to + 16 * part, floats(_e2m1(q)) * _UE4M3[data[at + part]])


@jit
def q2_k(data, out):
    dl, ml = np.empty(16, np.float32), np.empty(16, np.float32)
    for b in range(len(out) // 256):
        at, to = block(data, b, 84, 256)
        sc = load_bytes(data, at)
        put(dl, 0, floats(sc & 15) * half(data, at + 80))
        put(ml, 0, floats(sc >> 4) * half(data, at + 82))
        for j in range(0, 16, 8):  # two halves of a block, of eight parts each
            q, r = load_bytes(data, at + 16 + 4 * j), load_bytes(data, at + 32 + 4 * j)
            for k in range(4):
                part = j + 2 * k
                put(out, to + 16 * part, floats(q >> 2 * k & 3) * dl[part] - ml[part])
                part += 1
                put(out, to + 16 * part, floats(r >> 2 * k & 3) * dl[part] - ml[part])


@jit
def q3_k(data, out):
    dl = np.empty(16, np.float32)
    for b in range(len(out) // 256):
        at, to = block(data, b, 110, 256)
        low, high = long(data, at + 96), word(data, at + 104)
        first = (high & _PAIRS) | (high >> 2 & _PAIRS) << 32
        second = (high >> 4 & _PAIRS) | (high >> 6 & _PAIRS) << 32
        low, top = low & _EIGHT_NIBBLES, low >> 4 & _EIGHT_NIBBLES
        sc = join(low | first << 4, top | second << 4) - 32
        put(dl, 0, floats(sc) * half(data, at + 108))
        h, g = load_bytes(data, at), load_bytes(data, at + 16)
        for j in range(0, 16, 8):  # two halves of a block, of eight parts each
            q, r = load_bytes(data, at + 32 + 4 * j), load_bytes(data, at + 48 + 4 * j)
            for k in range(4):
                part, bit = j + 2 * k, j // 2 + k
                v = (q >> 2 * k & 3 | (h >> bit & 1) << 2) - 4
                put(out, to + 16 * part, floats(v) * dl[part])
                part += 1
                v = (r >> 2 * k & 3 | (g >> bit & 1) << 2) - 4
                put(out, to + 16 * part, floats(v) * dl[part])


@helper
def _scales_and_minima(data, at, both):
    """Eight scales, then eight minima, of a block of Q4_K or Q5_K; see k.py for the bits."""
    sc, mn, low = word(data, at + 4), word(data, at + 8), word(data, at + 12)
    sc = (sc & _SIXES) | ((low & _NIBBLES) | (sc >> 2 & _TOPS)) << 32
    mn = (mn & _SIXES) | ((low >> 4 & _NIBBLES) | (mn >> 2 & _TOPS)) << 32
    d = select(lanes_of(0xFF), splat(half(data, at)), splat(half(data, at + 2)))
    put(both, 0, floats(join(sc, mn)) * d)


@jit
def q4_k(data, out):
    s = np.empty(16, np.float32)
    for b in range(len(out) // 256):
        at, to = block(data, b, 144, 256)
        _scales_and_minima(data, at, s)
        for j in range(4):
            for i in range(0, 32, 16):
                q, p = load_bytes(data, at + 16 + 32 * j + i), to + 64 * j + i
                put(out, p, floats(q & 15) * s[2 * j] - s[2 * j + 8])
                put(out, p + 32, floats(q >> 4) * s[2 * j + 1] - s[2 * j + 9])


@helper
def _fives(q, h, j, s, out, to):
    low, high = (h >> 2 * j & 1) << 4, (h >> 2 * j + 1 & 1) << 4
    put(out, to, floats(q & 15 | low) * s[2 * j] - s[2 * j + 8])
    put(out, to + 32, floats(q >> 4 | high) * s[2 * j + 1] - s[2 * j + 9])


@jit
def q5_k(data, out):
    s = np.empty(16, np.float32)
    for b in range(len(out) // 256):
        at, to = block(data, b, 176, 256)
        _scales_and_minima(data, at, s)
        h, after = load_bytes(data, at + 16), load_bytes(data, at + 32)
        for j in range(4):
            q, p = at + 48 + 32 * j, to + 64 * j
            _fives(load_bytes(data, q), h, j, s, out, p)
            _fives(load_bytes(data, q + 16), after, j, s, out, p + 16)


@jit
def q6_k(data, out):
    dl = np.empty(16, np.float32)
    for b in range(len(out) // 256):
        at, to = block(data, b, 210, 256)
        put(dl, 0, floats(load_signed(data, at + 192)) * half(data, at + 208))
        for j in range(2):
            ql, qh = at + 64 * j, at + 128 + 32 * j
            x, y, h = load_bytes(data, ql), load_bytes(data, ql + 32), load_bytes(data, qh)
            u, v = load_bytes(data, ql + 16), load_bytes(data, ql + 48)
            g, p, s = load_bytes(data, qh + 16), to + 128 * j, 8 * j
            put(out, p, floats((x & 15 | (h & 3) << 4) - 32) * dl[s])
            put(out, p + 16, floats((u & 15 | (g & 3) << 4) - 32) * dl[s + 1])
            put(out, p + 32, floats((y & 15 | (h & 12) << 2) - 32) * dl[s + 2])
            put(out, p + 48, floats((v & 15 | (g & 12) << 2) - 32) * dl[s + 3])
            put(out, p + 64, floats((x >> 4 | h & 48) - 32) * dl[s + 4])
            put(out, p + 80, floats((u >> 4 | g & 48) - 32) * dl[s + 5])
            put(out, p + 96, floats((y >> 4 | h >> 2 & 48) - 32) * dl[s + 6])
            put(out, p + 112, floats((v >> 4 | g >> 2 & 48) - 32) * dl[s + 7])


@jit
def iq4_xs(data, out):
    for b in range(len(out) // 256):
        at, to = block(data, b, 136, 256)
        d, high, low = half(data, at), short(data, at + 2), word(data, at + 4)
        for j in range(8):
            dl = d * f4((low >> 4 * j & 15 | (high >> 2 * j & 3) << 4) - 32)
            q, p = load_bytes(data, at + 8 + 16 * j), to + 32 * j
            put(out, p, floats(_uneven(q & 15)) * dl)
            put(out, p + 16, floats(_uneven(q >> 4)) * dl)


@helper
def _put_signed(out, to, low, high, signs, dl):
    """Two rows of eight int8, where bit j of `signs` negates weight j, times dl."""
    v = floats(join(low, high))
    put(out, to, select(lanes_of(signs), -v, v) * dl)


@helper
def _even(signs):
    """Sixteen signs from two times seven: each eighth makes the count even."""
    return _EVEN_SIGNS[signs & 127] | _EVEN_SIGNS[signs >> 7 & 127] << 8


@jit
def iq2_xxs(data, out, grid):
    for b in range(len(out) // 256):
        at, to = block(data, b, 66, 256)
        d = half(data, at)
        for j in range(8):
            qs, aux = at + 2 + 8 * j, word(data, at + 6 + 8 * j)
            dl, p = d * (f4(aux >> 28) + f4(0.5)) * f4(0.25), to + 32 * j
            _put_signed(out, p, grid[data[qs]], grid[data[qs + 1]], _even(aux), dl)
            _put_signed(out, p + 16, grid[data[qs + 2]], grid[data[qs + 3]], _even(aux >> 14), dl)


@jit
def iq2_xs(data, out, grid):
    for b in range(len(out) // 256):
        at, to = block(data, b, 74, 256)
        d, scales = half(data, at), long(data, at + 66)
        for j in range(16):
            q = word(data, at + 2 + 4 * j)
            dl = d * (f4(scales >> 4 * j & 15) + f4(0.5)) * f4(0.25)
            signs = _even(q >> 9 & 127 | q >> 18 & 127 << 7)
            _put_signed(out, to + 16 * j, grid[q & 511], grid[q >> 16 & 511], signs, dl)


@jit
def iq2_s(data, out, grid):
    for b in range(len(out) // 256):
        at, to = block(data, b, 82, 256)
        d, high, scales = half(data, at), long(data, at + 66), long(data, at + 74)
        for j in range(16):
            dl = d * (f4(scales >> 4 * j & 15) + f4(0.5)) * f4(0.25)
            first = data[at + 2 + 2 * j] | (high >> 4 * j & 3) << 8
            second = data[at + 3 + 2 * j] | (high >> 4 * j + 2 & 3) << 8
            signs = short(data, at + 34 + 2 * j)
            _put_signed(out, to + 16 * j, grid[first], grid[second], signs, dl)


@jit
def iq3_xxs(data, out, grid):
    for b in range(len(out) // 256):
        at, to = block(data, b, 98, 256)
        d = half(data, at)
        for j in range(8):
            aux = word(data, at + 66 + 4 * j)
            dl = d * (f4(aux >> 28) + f4(0.5)) * f4(0.5)
            for i in range(2):
                q = word(data, at + 2 + 8 * j + 4 * i)
                low = grid[q & 255] | grid[q >> 8 & 255] << 32
                high = grid[q >> 16 & 255] | grid[q >> 24] << 32
                _put_signed(out, to + 32 * j + 16 * i, low, high, _even(aux >> 14 * i), dl)


@jit
def iq3_s(data, out, grid):
    for b in range(len(out) // 256):
        at, to = block(data, b, 110, 256)
        d, high, scales = half(data, at), long(data, at + 66), word(data, at + 106)
        for j in range(16):
            dl = d * (f4(1) + f4(2) * f4(scales >> 4 * (j // 2) & 15))
            q, h = word(data, at + 2 + 4 * j), high >> 4 * j << 8
            low = grid[q & 255 | h & 256] | grid[q >> 8 & 255 | h >> 1 & 256] << 32
            top = grid[q >> 16 & 255 | h >> 2 & 256] | grid[q >> 24 | h >> 3 & 256] << 32
            _put_signed(out, to + 16 * j, low, top, short(data, at + 74 + 2 * j), dl)


@jit
def iq1_s(data, out, grid):
    for b in range(len(out) // 256):
        at, to = block(data, b, 50, 256)
        d = half(data, at) * f4(0.125)
        for j in range(8):
            h = short(data, at + 34 + 2 * j)
            dl = d * f4(2 * (h >> 12 & 7) + 1)
            for i in range(2):
                q, bits = short(data, at + 2 + 4 * j + 2 * i), h >> 6 * i
                first = q & 255 | (bits & 7) << 8 | (h >> 15) << 11
                second = q >> 8 | (bits >> 3 & 7) << 8 | (h >> 15) << 11
                put(out, to + 32 * j + 16 * i, floats(join(grid[first], grid[second])) * dl)


@jit
def iq1_m(data, out, grid):
    for b in range(len(out) // 256):
        at, to = block(data, b, 56, 256)
        scales = long(data, at + 48)
        # the upper nibbles of four words make d
        d = half_value(
            scales >> 12 & 15 | scales >> 24 & 240 | scales >> 36 & 3840 | scales >> 48 & 61440
        )
        for j in range(16):
            dl = d * f4(0.125) * f4(2 * (scales >> 16 * (j // 4) + 3 * (j % 4) & 7) + 1)
            q, h = short(data, at + 2 * j), data[at + 32 + j]
            low, high = grid[q & 255 | (h & 15) << 8], grid[q >> 8 | h >> 4 << 8]
            put(out, to + 16 * j, floats(join(low, high)) * dl)


@jit
def tq2_0(data, out):
    for b in range(len(out) // 256):
        at, to = block(data, b, 66, 256)
        d = half(data, at + 64)
        for j in range(2):
            q, r = load_bytes(data, at + 32 * j), load_bytes(data, at + 32 * j + 16)
            for k in range(4):
                p = to + 128 * j + 32 * k
                put(out, p, floats((q >> 2 * k & 3) - 1) * d)
                put(out, p + 16, floats((r >> 2 * k & 3) - 1) * d)


@helper
def _trit(q, power):
    """Digit of base 3 after `power` has moved it to the front; see ternary.py."""
    return floats(((q * power & 255) * 3 >> 8) - 1)


@jit
def tq1_0(data, out):
    tail = np.empty(16, np.uint8)
    for b in range(len(out) // 256):
        at, to = block(data, b, 54, 256)
        d = half(data, at + 52)
        for j in range(3):
            q, p = load_bytes(data, at + 16 * j), to + 16 * j + (j // 2) * 128
            step = 32 - 16 * (j // 2)
            power = 1
            for k in range(5):
                put(out, p + step * k, _trit(q, power) * d)
                power *= 3
        power = 1
        for k in range(4):  # the last four bytes hold four digits each
            for i in range(4):
                tail[4 * k + i] = data[at + 48 + i] * power & 255
            power *= 3
        put(out, to + 240, _trit(load_bytes(tail, 0), 1) * d)
