"""The searches of `codebook.py`, compiled; its comments are not repeated here.

Sub-blocks go one after another, since each vector has neighbours of its own; the vectors' lanes
are neighbours, which are looked through sixteen at a time.
"""

from functools import cache

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from numpy import ndarray as Array

from .codebook import Codebook, codebook
from .numba_jit import ONE, ZERO, f4, jit, u1
from .numba_memory import load, load_bytes, store_bytes
from .numba_vector import (
    LANES,
    first_of,
    floats,
    greater,
    helper,
    lesser,
    nearest,
    smallest_lane,
    splat,
)

_LARGEST, _HALF, _QUARTER = f4(np.finfo(np.float32).max), f4(0.5), f4(0.25)


@cache
def tables(qtype: T) -> tuple[Array, ...]:
    return tables_of(codebook(qtype, torch.device("cpu")))


def tables_of(book: Codebook) -> tuple[Array, Array, Array, Array, Array, Array]:
    """index, first and count of a number's neighbours, these (rows, and their values), and values.

    index, first, count: (numbers,) int32. near: int32, each list padded to sixteens by its last.
    near_values: uint8, (16 neighbours) by (dim) transposed, flattened. values: (rows · dim,) uint8.
    """
    index, count, lists = (t.numpy() for t in (book.index, book.count, book.near))
    rows = (2 * book.rows + 1).to(torch.uint8).numpy()
    off = np.flatnonzero(index < 0)
    padded = -(-count[off] // LANES) * LANES
    first = np.zeros(len(index), np.int32)
    first[off] = np.cumsum(padded) - padded
    places = np.arange(padded.sum()) - np.repeat(first[off], padded)
    number = np.repeat(off, padded)
    near = lists[number, np.minimum(places, count[number] - 1)]
    near_values = rows[near].reshape(-1, LANES, rows.shape[1]).transpose(0, 2, 1)
    index, count = index.astype(np.int32), count.astype(np.int32)
    return index, first, count, near.astype(np.int32), near_values.ravel(), rows.ravel()


@jit
def weigh(x, share, out):
    """out = x² + share·(mean square of the 256) in the order of ggml's IQ2_S, or x² for 0."""
    for b in range(len(x) // 256):
        total = ZERO
        if share != ZERO:
            for i in range(b * 256, b * 256 + 256):
                total += x[i] * x[i]
        sigma2 = _QUARTER * (f4(share) * total / f4(256))
        for i in range(b * 256, b * 256 + 256):
            out[i] = sigma2 + x[i] * x[i] if share != ZERO else x[i] * x[i]


@jit
def magnitudes(x, w, even, values, signs):
    """values like x (flattened), signs (len(x) / 8,)."""
    for e in range(len(x) // 8):
        byte, least, flipped, at = 0, ZERO, 0, 0
        for i in range(8):
            k = e * 8 + i
            values[k] = x[k]
            if x[k] < ZERO:
                values[k], byte, flipped = -x[k], byte | (1 << i), flipped ^ 1
            loss = w[k] * x[k] * x[k]
            if i == 0 or loss < least:
                least, at = loss, i
        if even and flipped:
            values[e * 8 + at] = -values[e * 8 + at]
            byte ^= 1 << at
        signs[e] = u1(byte)


@helper
def nearest_neighbour(neighbours, x, w, at, dim, scale):
    """The row among a number's neighbours that loses least at weights `at` …"""
    first, count, near, near_values = neighbours
    best, place = _LARGEST, 0
    for c in range(0, count if count > 1 else 0, LANES):
        d2 = splat(ZERO)
        for i in range(dim):
            q = floats(load_bytes(near_values, (first + c) * dim + i * LANES))
            diff = scale * q - x[at + i]
            d2 += w[at + i] * diff * diff
        least = smallest_lane(d2)
        if least < best:
            same = d2 == least
            best, place = least, c + first_of(same, same)
    return near[first + place]


@helper
def find_rows(x, w, at, size, dim, levels, scales, book, codes, numbers, rows, on):
    """The rows for a sub-block's codes at scales = (1/scale, scale); on: do they have these codes?

    rows, on (vectors,) and numbers, the codes as numbers, hold those of the try before; returned is
    whether any has changed.
    """
    (inv, scale), changed = scales, False
    index, first, count, near, near_values, _ = book
    for i in range(0, size, LANES):
        code = nearest(_HALF * (inv * load(x, at + i) - ONE))
        store_bytes(codes, i, lesser(greater(code, 0), levels - 1))
    for k in range(size // dim):
        number = 0
        for i in range(dim - 1, -1, -1):
            number = number * levels + codes[k * dim + i]
        row, same = index[number], number == numbers[k]
        if row >= 0 and same:
            continue
        numbers[k], on[k] = number, row >= 0
        if row < 0:
            some = first[number], count[number], near, near_values
            row = nearest_neighbour(some, x, w, at + k * dim, dim, scale)
        changed |= not same or row != rows[k]
        rows[k] = row
    return changed


@helper
def sums_of(x, w, at, dim, rows, values):
    """The sums of w·x·q and w·q²."""
    sumqx = sumq2 = ZERO
    for k in range(len(rows)):
        for i in range(dim):
            j = at + k * dim + i
            q = f4(values[rows[k] * dim + i])
            sumqx += w[j] * x[j] * q
            sumq2 += w[j] * q * q
    return sumqx, sumq2


@helper
def steps_to_begin(x, at, size, eps):
    """The largest x, and whether it counts as zero."""
    largest = x[at]
    for i in range(1, size):
        largest = max(largest, x[at + i])
    return largest, largest < eps if eps > ZERO else largest == ZERO


@jit
def search(
    x, w, roots, size, dim, levels, tries, step, eps, again, start, book, scales, rows, zero
):
    """scales and zero (columns,), rows (columns, vectors) int32; again: 0 off, 1 all, 2 always."""
    top, vectors, values = 2 * levels - 1, size // dim, book[5]
    codes = np.empty(32, np.uint8)
    tried, on, tried_on, numbers = np.empty((4, vectors), np.int32)
    for column in range(len(scales)):
        at, found = column * size, rows[column]
        amax, flat = steps_to_begin(x, at, size, f4(eps))
        scale = amax / f4(top)
        if again == 2:
            scale = start[column]
            amax = scale * f4(levels)
            flat = flat or amax <= ZERO
        found[:], on[:], best = 0, again == 0, ZERO
        zero[column], scales[column] = flat, ZERO
        if flat:
            continue
        numbers[:] = -1
        for k in range(-tries, tries + 1):
            inv = (f4(top) + f4(k) * f4(step)) / amax
            both = inv, ONE / inv
            if not find_rows(
                x, roots, at, size, dim, levels, both, book, codes, numbers, tried, tried_on
            ):
                continue  # the sums are those of the try before
            sumqx, sumq2 = sums_of(x, w, at, dim, tried, values)
            if sumq2 > ZERO and sumqx * sumqx > best * sumq2:
                scale = sumqx / sumq2
                best = scale * sumqx
                found[:], on[:] = tried, tried_on
        all_on = on.min() == 1
        if scale > ZERO and (again == 2 or not all_on):
            both = ONE / scale, scale
            find_rows(x, roots, at, size, dim, levels, both, book, codes, numbers, tried, tried_on)
            for k in range(vectors):
                if again > 0 or on[k] == 0:
                    found[k] = tried[k]
            sumqx, sumq2 = sums_of(x, w, at, dim, found, values)
            scale = sumqx / sumq2 if sumq2 > ZERO else scale
        scales[column] = scale


AGAIN = {"off": 0, "all": 1, "always": 2}
