"""Attention on CPUs with AVX-512 BF16, by AMX or by the instruction that sums pairs of products.

torch's fused kernel multiplies bfloat16 as slowly as float32 without AMX, and makes exponentials
slowly with it. Here keys and values of a head are packed once, as `numba_tile` reads them; a few
queries at a time then meet all keys, the whole rows of scores staying in cache, so that one plain
softmax will do; and the probabilities, rounded to bfloat16, meet the values. Queries, keys, values
and probabilities are each rounded once, all sums are in float32.
"""

import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .numba_jit import AMX, ZERO, f4, jit
from .numba_memory import aligned, load, store, sum_of_lanes
from .numba_native import address, floats_at, in_parts, reader_of
from .numba_pointwise import power_of_2
from .numba_tile import COLUMNS, ROWS, hold, interleave, make_tile, pack, pack_rows, release
from .numba_vector import LANES, biggest_lane, helper, select, splat

_STEP = COLUMNS * LANES  # keys, or numbers of a value, of a tile
_LOG2_E = 1.4426950408889634
# Numbers of a head's keys up to which all stays in cache: with more torch is faster, if it has AMX.
MOST = 2**19 if AMX else sys.maxsize
_tile = make_tile(COLUMNS)


@helper
def _softmax(s, at, keys, padded, factor, p, to):
    """p[to :] = exp(factor·(s - most)) in pairs of bfloat16, factor to base 2. -> their sum."""
    for i in range(keys, padded):
        s[at + i] = -np.inf
    largest = splat(f4(-np.inf))
    for i in range(at, at + padded, LANES):
        v = load(s, i)
        largest = select(v > largest, v, largest)
    most = splat(biggest_lane(largest) * factor)  # rounded as in the loop: the largest has 2^0
    total = splat(ZERO)
    for i in range(0, padded, 2 * LANES):
        low = power_of_2(load(s, at + i) * factor - most)
        high = power_of_2(load(s, at + i + LANES) * factor - most)
        total += low + high
        store(p, to + i // 2, pack(low, high))
    return total


@helper
def _pack_values(v, at, step, keys, padded, width, panel):
    """panel: for each sixteen numbers of a value, each pair of keys, a vector of those numbers."""
    for i in range(0, width, LANES):
        for key in range(0, padded, 2):
            low = high = splat(ZERO)
            if key < keys:
                low = load(v, at + key * step + i)
            if key + 1 < keys:
                high = load(v, at + (key + 1) * step + i)
            store(panel, (i * padded + key * LANES) // 2, interleave(low, high))


class _Told(NamedTuple):
    """What the threads are told, see `attend`; names of tensors are addresses."""

    q: int
    k: int
    v: int
    out: int
    pictures: int
    rows: int
    keys: int
    heads: int
    width: int


_told = reader_of(_Told)


@jit
def _attend(told, first, end):
    """Heads first … end of all pictures' heads."""
    t = _told(told)
    rows, keys, heads, width = t.rows, t.keys, t.heads, t.width
    numbers = t.pictures * heads * width
    q, out = floats_at(t.q, numbers * rows), floats_at(t.out, numbers * rows)
    k, v = floats_at(t.k, numbers * keys), floats_at(t.v, numbers * keys)
    padded, pairs, step = -(-keys // _STEP) * _STEP, width // 2, heads * width
    key_panel, value_panel = aligned(padded * pairs), aligned(padded * pairs)
    row, o = aligned(LANES * pairs), aligned(ROWS * width)
    a, s, p = aligned(ROWS * pairs), aligned(ROWS * padded), aligned(ROWS * padded // 2)
    a[:], p[:] = ZERO, ZERO
    share, lanes = aligned(ROWS), aligned(LANES)
    factor, held = f4(_LOG2_E / np.sqrt(width)), hold()
    for head in range(first, end):
        at = (head // heads * keys * heads + head % heads) * width
        pack_rows(k, at, step, keys, 0, padded, width, row, key_panel)
        _pack_values(v, at, step, keys, padded, width, value_panel)
        at = (head // heads * rows * heads + head % heads) * width
        for start in range(0, rows, ROWS):
            n = min(ROWS, rows - start)
            for r in range(n):
                for i in range(0, pairs, LANES):
                    place = at + (start + r) * step + 2 * i
                    store(a, r * pairs + i, pack(load(q, place), load(q, place + LANES)))
            for key in range(0, padded, _STEP):
                _tile(a, 0, pairs, key_panel, key * pairs, LANES * pairs, pairs, s, key, padded)
            for r in range(n):
                total = _softmax(s, r * padded, keys, padded, factor, p, r * padded // 2)
                share[r] = f4(1.0) / sum_of_lanes(total, lanes)
            half = padded // 2
            for i in range(0, width, _STEP):
                _tile(p, 0, half, value_panel, i * half, LANES * half, half, o, i, width)
            for r in range(n):
                for i in range(0, width, LANES):
                    place = at + (start + r) * step + i
                    store(out, place, load(o, r * width + i) * share[r])
    release(held)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (pictures, tokens, heads, width) to k and v (pictures, keys, heads, width),
    float32 on a CPU, contiguous -> like q. `width` is a multiple of 64.
    """
    pictures, rows, heads, width = q.shape
    out, keys = torch.empty_like(q), k.shape[1]
    places = (address(t.detach(), torch.float32) for t in (q, k, v, out))
    told = _Told(*places, pictures, rows, keys, heads, width)
    in_parts(_attend, told, pictures * heads, 1, rows * keys)
    return out
