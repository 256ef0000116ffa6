"""Kernels that write TQ1_0 and TQ2_0, as `ternary.py` does.

`x` is n · 256 float32, flattened, `out` (n, type_size) uint8.
"""

import numpy as np

from .numba_jit import f4, i4, jit, store_half, u1
from .numba_memory import load, store_bytes
from .numba_pack import pack_2_bits
from .numba_small import reciprocal, round_half_away
from .numba_vector import LANES, bits_of, greater, helper, largest_lane


@helper
def nearest_trits(x, b, q):
    """d of super-block b, its largest magnitude; q (256,) = round(x/d) + 1."""
    largest = bits_of(abs(load(x, b * 256)))
    for i in range(LANES, 256, LANES):
        largest = greater(largest, bits_of(abs(load(x, b * 256 + i))))
    d = i4(largest_lane(largest)).view(np.float32)
    inv_d = f4(reciprocal(d))
    for i in range(0, 256, LANES):
        store_bytes(q, i, round_half_away(load(x, b * 256 + i) * inv_d) + 1)
    return d


@helper
def pack_trits(q, count, out):
    """count · len(out) trits -> bytes: the base-3 fraction of up to five digits, rounded up."""
    for i in range(len(out)):
        number = i4(0)
        for k in range(5):
            number = number * i4(3) + (i4(q[k * len(out) + i]) if k < count else i4(0))
        out[i] = u1((number * i4(256) + i4(242)) // i4(243))


@jit
def quantize_tq1_0(x, out):
    q = np.empty(256, np.uint8)
    for b in range(len(out)):
        store_half(out[b], 52, nearest_trits(x, b, q))
        pack_trits(q[:160], 5, out[b, :32])
        pack_trits(q[160:240], 5, out[b, 32:48])
        pack_trits(q[240:], 4, out[b, 48:52])


@jit
def quantize_tq2_0(x, out):
    q = np.empty(256, np.uint8)
    for b in range(len(out)):
        store_half(out[b], 64, nearest_trits(x, b, q))
        pack_2_bits(q, out[b, :64])
