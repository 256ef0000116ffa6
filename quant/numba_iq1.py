"""The search of `iq1_quantize.py`, compiled; its comments are not repeated here.

Sixteen sub-blocks are split side by side, one in each lane. Then their vectors go one after
another, as in `numba_codebook.py`, since each has neighbours of its own.
"""

from functools import cache

import numpy as np
import torch
from numpy import ndarray as Array

from .iq1_quantize import book
from .numba_codebook import tables_of
from .numba_jit import ONE, ZERO, f4, jit
from .numba_memory import load, load_bytes, store
from .numba_vector import (
    LANES,
    bits_of,
    first_of,
    floats,
    helper,
    select,
    set_lanes,
    smallest_lane,
    splat,
)

_LARGEST, _HALF, _DELTA = f4(np.finfo(np.float32).max), f4(0.5), f4(0.125)
_PLACES = 64  # more than a place of a split can be
_CHOICES = 4  # of shifts, at most


@cache
def tables() -> tuple[Array, ...]:
    return tables_of(book(torch.device("cpu")))


@helper
def sort_into(x, w, at, size, lane, lanes, weights, order):
    """A lane of (size, 16) values and weights, flattened, in the values' order; equals keep it."""
    for i in range(size):
        value, j = x[at + i], i
        while j > 0 and value < lanes[(j - 1) * LANES + lane]:
            lanes[j * LANES + lane] = lanes[(j - 1) * LANES + lane]
            order[lane, j] = order[lane, j - 1]
            j -= 1
        lanes[j * LANES + lane], order[lane, j] = value, i
    for j in range(size):
        weights[j * LANES + lane] = w[at + order[lane, j]]


@helper
def improve(found, sumqx, sumq2, number):
    """found = (best, scale, number of the try) with this try, in lanes where it is better."""
    best, scale, place = found
    better = (sumq2 > ZERO) & (sumqx * sumqx > best * sumq2)
    if set_lanes(better):
        tried = sumqx / sumq2
        scale, best = select(better, tried, scale), select(better, tried * sumqx, best)
        place = select(better, number, place)
    return best, scale, place


@helper
def split_by_sums(x, w, size, sumx, sumw):
    """Each lane's scale and (low, high, choice) as one number; sums (size + 1, 16), flattened."""
    found = splat(-_LARGEST), splat(ZERO), bits_of(splat(ZERO)) - 1
    store(sumx, 0, splat(ZERO))
    store(sumw, 0, splat(ZERO))
    for j in range(0, size * LANES, LANES):
        store(sumx, j + LANES, load(sumx, j) + load(w, j) * load(x, j))
        store(sumw, j + LANES, load(sumw, j) + load(w, j))
    allx, allw = load(sumx, size * LANES), load(sumw, size * LANES)
    for low in range(size + 1):
        lowx, loww = load(sumx, low * LANES), load(sumw, low * LANES)
        for high in range(low, size + 1):
            highx, highw = load(sumx, high * LANES), load(sumw, high * LANES)
            number = (low * _PLACES + high) * _CHOICES
            for choice in range(2):
                q1 = _DELTA if choice == 0 else -_DELTA
                q0, q2 = q1 - ONE, q1 + ONE
                sumqx = lowx * q0 + (highx - lowx) * q1 + (allx - highx) * q2
                sumq2 = loww * q0 * q0 + (highw - loww) * q1 * q1 + (allw - highw) * q2 * q2
                found = improve(found, sumqx, sumq2, number + choice)
    return found[1], found[2]


@helper
def make_terms(x, w, size, order, terms):
    """terms (level, choice, place, 2, 16), flattened: w·q·x and w·q²."""
    at = 0
    for level in range(3):
        for choice in range(_CHOICES):
            for j in range(size):
                for lane in range(LANES):
                    down = choice & (1 if order[lane, j] >= 8 else 2)
                    q = f4(level - 1) + (-_DELTA if down else _DELTA)
                    k = j * LANES + lane
                    wq = w[k] * q
                    terms[at + lane], terms[at + LANES + lane] = wq * x[k], wq * q
                at += 2 * LANES


@helper
def split_by_terms(size, terms, before, between):
    """As `split_by_sums`; before, between (choice, 2, 16), flattened."""
    found = splat(-_LARGEST), splat(ZERO), bits_of(splat(ZERO)) - 1
    pair = 2 * LANES
    row = size * pair
    before[:] = ZERO
    for low in range(size + 1):
        between[:] = before
        for high in range(low, size + 1):
            number = (low * _PLACES + high) * _CHOICES
            for choice in range(_CHOICES):
                at, above = choice * pair, (2 * _CHOICES + choice) * row
                sumqx, sumq2 = load(between, at), load(between, at + LANES)
                for j in range(above + high * pair, above + row, pair):
                    sumqx += load(terms, j)
                    sumq2 += load(terms, j + LANES)
                found = improve(found, sumqx, sumq2, number + choice)
                if high < size:
                    j = (_CHOICES + choice) * row + high * pair
                    store(between, at, load(between, at) + load(terms, j))
                    store(between, at + LANES, load(between, at + LANES) + load(terms, j + LANES))
        if low < size:
            for choice in range(_CHOICES):
                at, j = choice * pair, choice * row + low * pair
                store(before, at, load(before, at) + load(terms, j))
                store(before, at + LANES, load(before, at + LANES) + load(terms, j + LANES))
    return found[1], found[2]


@helper
def nearest_neighbour(neighbours, x, w, at, scale, shift):
    """The row among a number's neighbours that loses least at weights `at` …"""
    first, count, near, near_values = neighbours
    best, place, offset = _LARGEST, 0, shift - f4(1.5)
    for c in range(0, count, LANES):
        d2 = splat(ZERO)
        for i in range(8):
            odd = floats(load_bytes(near_values, (first + c) * 8 + i * LANES))
            diff = scale * (odd * _HALF + offset) - x[at + i]
            d2 += w[at + i] * diff * diff
        least = smallest_lane(d2)
        if least < best:
            same = d2 == least
            best, place = least, c + first_of(same, same)
    return near[first + place]


@helper
def find_rows(x, w, at, levels, scale, tables, rows, down):
    """Rows for a sub-block's levels, and its scale, fitted anew if some are no row's."""
    index, first, count, near, near_values, values = tables
    on, sumqx, sumq2 = True, ZERO, ZERO
    for k in range(len(rows)):
        number, shift, begin = 0, -_DELTA if down[k] else _DELTA, at + 8 * k
        for i in range(7, -1, -1):
            number = number * 3 + levels[8 * k + i]
        rows[k] = index[number]
        if rows[k] < 0:
            on, some = False, (first[number], count[number], near, near_values)
            rows[k] = nearest_neighbour(some, x, w, begin, scale, shift)
        for i in range(8):
            q = f4(values[rows[k] * 8 + i]) * _HALF + (shift - f4(1.5))
            wq = w[begin + i] * q
            sumqx += wq * x[begin + i]
            sumq2 += wq * q
    return sumqx / sumq2 if not on and sumqx > ZERO and sumq2 > ZERO else scale


@helper
def largest_of(x, at, size):
    largest = ZERO
    for i in range(at, at + size):
        largest = max(largest, abs(x[i]))
    return largest


@helper
def take_split(place, below, order, size, levels, down):
    """levels (size,) and down (vectors,) of a split; below: with the other sign."""
    low, high, choice = place >> 8, (place >> 2) % _PLACES, place % _CHOICES
    for j in range(size):
        level = (1 if j >= low else 0) + (1 if j >= high else 0)
        levels[order[j]] = 2 - level if below else level
    if len(down) == 4:
        down[:] = 1 - choice if below else choice
    else:
        choice = 3 - choice if below else choice
        down[0], down[1] = choice >> 1, choice & 1


@jit
def search(x, w, size, eps, tables, scales, rows, down):
    """scales (columns,), rows and down (columns, size / 8) int32."""
    lanes, weights = np.zeros((2, size * LANES), np.float32)
    sums = np.empty((2, (size + 1) * LANES), np.float32)
    terms = np.empty(3 * _CHOICES * size * 2 * LANES, np.float32)
    running = np.empty((2, _CHOICES * 2 * LANES), np.float32)
    order, levels = np.zeros((LANES, size), np.int32), np.empty(size, np.int32)
    found, places = np.empty((2, LANES), np.float32)
    for start in range(0, len(scales), LANES):
        columns = min(LANES, len(scales) - start)
        for lane in range(columns):
            sort_into(x, w, (start + lane) * size, size, lane, lanes, weights, order)
        if size == 32:
            scale, place = split_by_sums(lanes, weights, size, sums[0], sums[1])
        else:
            make_terms(lanes, weights, size, order, terms)
            scale, place = split_by_terms(size, terms, running[0], running[1])
        store(found, 0, scale)
        store(places, 0, floats(place))
        for lane in range(columns):
            column, number, scale_found = start + lane, int(places[lane]), found[lane]
            scales[column], rows[column], down[column] = ZERO, 0, 0
            at, those = column * size, (rows[column], down[column])
            if number < 0 or largest_of(x, at, size) < f4(eps):
                continue
            take_split(number, scale_found < ZERO, order[lane], size, levels, those[1])
            scales[column] = find_rows(x, w, at, levels, abs(scale_found), tables, *those)
