"""Quantising on CPUs by compiled kernels, put together for each type, on every thread.

numba is optional: without it `quantize` takes the torch formulation, whose bytes these equal. The
kernels let go of the GIL, so plain threads do. A function here takes x (n, block_size) float32, the
importance like it or None, and writes to out (n, type_size) uint8.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from numpy import ndarray as Array
from torch import Tensor

from . import (
    codebook,
    effort,
    iq1_quantize,
    numba_codebook,
    numba_effort,
    numba_iq1,
    numba_iq4,
    numba_measure,
    numba_pack,
    numba_small,
    numba_ternary,
)
from . import numba_groups as groups
from .numba_vector import LANES
from .threads import in_threads

_STEP = 2**16  # weights at a time in a thread: with their importance and codes they stay in cache
_IMPORTANCE_GRID = (-0.9, 0.05, 36)
_SPARE = 2**12  # codes beyond the last group, see `numba_groups`
_NONE = np.empty(0, np.float32)


def _floats(*shape: int) -> Array:
    return np.empty(shape, np.float32)


def _codes(groups: int, size: int) -> Array:
    """As `numba_groups` lays them out."""
    return np.empty(-(-groups // LANES) * LANES * size, np.uint8)


def _weigh(x: Array, w: Array, factor: float, share: float) -> Array:
    """Flattened."""
    out = _floats(x.size)
    groups.weigh(x.reshape(-1), w.reshape(-1), x.shape[1], factor, share, out)
    return out


def _symmetric(nmax: int, x: Array, w: Array | None, out: Array) -> None:
    if w is None:
        numba_small.quantize_symmetric(x.reshape(-1), nmax, out)
        return
    d, codes = _floats(len(x)), _codes(len(x), 32)
    groups.search_symmetric(x.reshape(-1), w.reshape(-1), 32, nmax, d, codes)
    numba_small.pack_found(d, _NONE, codes, out)


def _with_minimum(nmax: int, x: Array, w: Array | None, out: Array) -> None:
    if w is None:
        numba_small.quantize_with_minimum(x.reshape(-1), nmax, out)
        return
    (d, mins), codes = _floats(2, len(x)), _codes(len(x), 32)
    flat = (x.reshape(-1), w.reshape(-1), 32)
    groups.search_ranges(*flat, nmax, _IMPORTANCE_GRID, False, d, mins, codes)
    numba_small.pack_found(d, mins, codes, out)


def _unweighted(
    kernel: Callable[[Array, Array], None], x: Array, w: Array | None, out: Array
) -> None:
    kernel(x.reshape(-1), out)


def _fractions(values: Array, sums: Array | None, steps: int) -> tuple[Array, Array]:
    """d (n,) and codes (n, sub-blocks) int32 for the scales or minima of super-blocks."""
    d, codes = _floats(len(values)), np.empty(values.shape, np.int32)
    if sums is None:
        groups.largest_fractions(values, steps, d, codes)
    else:
        groups.search_fractions(values, sums, steps, d, codes)
    return d, codes


def _sums(weights: Array, size: int) -> Array:
    """(n, sub-blocks): the sum of each sub-block's weights."""
    sums = _floats(weights.size // size)
    groups.sum_groups(weights, size, sums)
    return sums.reshape(-1, 256 // size)


def _q2_k(x: Array, w: Array | None, out: Array) -> None:
    (scales, mins), flat = _floats(2, len(x), 16), x.reshape(-1)
    weights = _NONE if w is None else _weigh(x, w, 1.0, 1 / 256)
    grid = (-0.5, 0.1, 15) if w is None else _IMPORTANCE_GRID
    codes = _codes(scales.size, 16)
    found = (scales.reshape(-1), mins.reshape(-1), codes)
    groups.search_ranges(flat, weights, 16, 3, grid, w is None, *found)
    sums = None if w is None else _sums(weights, 16)
    (d, sc), (dmin, m) = _fractions(scales, sums, 15), _fractions(mins, sums, 15)
    numba_pack.pack_q2_k(flat, d, dmin, sc, m, codes, out)


def _q3_k(x: Array, w: Array | None, out: Array) -> None:
    scales, d, flat = _floats(len(x), 16), _floats(len(x)), x.reshape(-1)
    codes = _codes(scales.size, 16)
    found = (scales.reshape(-1), codes)
    if w is None:
        groups.search_by_moving(flat, 16, 4, *found)
        sc = np.empty(scales.shape, np.int32)
        groups.signed_fractions(scales, d, sc)
    else:
        weights = _weigh(x, w, 2.0, 1 / 256)
        groups.search_symmetric(flat, weights, 16, 4, *found)
        sums, scale_codes = _sums(weights, 16).reshape(-1), _codes(len(x), 16)
        groups.search_symmetric(scales.reshape(-1), sums, 16, 32, d, scale_codes)
        sc = scale_codes.reshape(-1, 16, LANES).transpose(0, 2, 1).reshape(-1, 16)
        sc = sc[: len(x)].astype(np.int32)
    numba_pack.pack_q3_k(flat, d, sc, codes, out)


def _q4_or_q5_k(
    nmax: int, grid: tuple[float, float, int], x: Array, w: Array | None, out: Array
) -> None:
    (scales, mins), flat = _floats(2, len(x), 8), x.reshape(-1)
    weights, codes = _NONE, _codes(scales.size, 32)
    if w is not None:
        weights, grid = _weigh(x, w, 2.0, 1 / 256), _IMPORTANCE_GRID
    found = (scales.reshape(-1), mins.reshape(-1), codes)
    groups.search_ranges(flat, weights, 32, nmax, grid, False, *found)
    sums = None if w is None else _sums(weights, 32)
    (d, sc), (dmin, m) = _fractions(scales, sums, 63), _fractions(mins, sums, 63)
    if w is None or nmax == 31:
        sc, m = np.minimum(sc & 0xFF, 63), np.minimum(m & 0xFF, 63)
    numba_pack.pack_q4_or_q5_k(flat, d, dmin, sc, m, codes, out)


def _q6_k(x: Array, w: Array | None, out: Array) -> None:
    scales, flat = _floats(len(x), 16), x.reshape(-1)
    weights, codes = _NONE if w is None else w.reshape(-1), _codes(scales.size, 16)
    groups.search_symmetric(flat, weights, 16, 32, scales.reshape(-1), codes)
    d, sc = _floats(len(x)), np.empty(scales.shape, np.int32)
    groups.byte_fractions(scales, d, sc)
    numba_pack.pack_q6_k(flat, d, sc, codes, out)


def _iq4(
    pack: Callable[[Array, Array, Array], None], x: Array, w: Array | None, out: Array
) -> None:
    weights = _NONE if w is None else _weigh(x, w, 1.0, 2 / x.shape[1])
    flat, scales = x.reshape(-1), _floats(x.size // 32)
    numba_iq4.search_levels(flat, weights, scales)
    pack(flat, scales, out)


def _high_symmetric(qtype: T, x: Array, w: Array | None, out: Array) -> None:
    nmax, limit = effort.SYMMETRIC[qtype]
    d, sc, flat = _floats(len(x)), np.empty((len(x), 16), np.int32), x.reshape(-1)
    weights, codes = _NONE if w is None else w.reshape(-1), np.zeros(x.size + _SPARE, np.uint8)
    numba_effort.fit_symmetric(flat, weights, nmax, limit, d, sc)
    if qtype == T.Q6_K:
        numba_pack.pack_q6_k(flat, d, sc, codes, out)
    else:
        numba_pack.pack_q3_k(flat, d, sc + limit, codes, out)


def _high_ranges(qtype: T, x: Array, w: Array | None, out: Array) -> None:
    (d, dmin), (sc, m) = _floats(2, len(x)), np.empty((2, len(x), 8), np.int32)
    weights, codes = _NONE if w is None else w.reshape(-1), np.zeros(x.size + _SPARE, np.uint8)
    numba_effort.fit_ranges(x.reshape(-1), weights, effort.RANGES[qtype], d, dmin, sc, m)
    numba_pack.pack_q4_or_q5_k(x.reshape(-1), d, dmin, sc, m, codes, out)


def _codebook(qtype: T, x: Array, w: Array | None, out: Array) -> None:
    row, flat, dim = codebook.SEARCHES[qtype], x.reshape(-1), 4 if "IQ3" in qtype.name else 8
    columns, values = x.size // row.size, _floats(x.size)
    signs, zero = np.empty(x.size // 8, np.uint8), np.empty(columns, np.bool_)
    scales, rows = _floats(columns), np.empty((columns, row.size // dim), np.int32)
    if w is None:
        weights = _floats(x.size)
        numba_codebook.weigh(flat, row.sigma if qtype == T.IQ2_S else 0.0, weights)
    else:
        weights = _weigh(x, w, row.sigma, 1 / 256)
    numba_codebook.magnitudes(flat, weights, row.even, values, signs)
    start, levels = _NONE, 8 if dim == 4 else 3
    if row.again == "always":
        shape = (columns, row.size)
        start, codes = _floats(columns), np.empty(shape, np.int32)
        groups.search_fractions(
            values.reshape(shape), weights.reshape(shape), levels + 1, start, codes
        )
    sizes = (row.size, dim, levels, row.tries, row.step, row.eps, numba_codebook.AGAIN[row.again])
    book = numba_codebook.tables(qtype)
    numba_codebook.search(
        values, weights, np.sqrt(weights), *sizes, start, book, scales, rows, zero
    )
    found = (scales, zero, signs.reshape(columns, -1), rows)
    out[:] = codebook.pack(qtype, *map(torch.from_numpy, found)).numpy()


def _iq1(qtype: T, x: Array, w: Array | None, out: Array) -> None:
    row, flat = iq1_quantize.FORMATS[qtype], x.reshape(-1)
    weights = flat * flat if w is None else _weigh(x, w, 2.0, 1 / 256)
    columns = x.size // row.size
    scales, (rows, down) = _floats(columns), np.empty((2, columns, row.size // 8), np.int32)
    numba_iq1.search(flat, weights, row.size, row.eps, numba_iq1.tables(), scales, rows, down)
    found = tuple(map(torch.from_numpy, (scales, rows, down)))
    parts = (torch.from_numpy(x), torch.from_numpy(weights.reshape(x.shape)))
    out[:] = iq1_quantize.pack(qtype, found, *parts).numpy()


_FUNCTIONS: dict[T, Callable[[Array, Array | None, Array], None]] = {
    T.Q4_0: partial(_symmetric, 8),
    T.Q4_1: partial(_with_minimum, 15),
    T.Q5_0: partial(_symmetric, 16),
    T.Q5_1: partial(_with_minimum, 31),
    T.Q8_0: partial(_unweighted, numba_small.quantize_q8_0),
    T.MXFP4: partial(_unweighted, numba_small.quantize_mxfp4),
    T.NVFP4: partial(_unweighted, numba_small.quantize_nvfp4),
    T.TQ1_0: partial(_unweighted, numba_ternary.quantize_tq1_0),
    T.TQ2_0: partial(_unweighted, numba_ternary.quantize_tq2_0),
    T.IQ4_NL: partial(_iq4, numba_iq4.pack_iq4_nl),
    T.IQ4_XS: partial(_iq4, numba_iq4.pack_iq4_xs),
    T.Q2_K: _q2_k,
    T.Q3_K: _q3_k,
    T.Q4_K: partial(_q4_or_q5_k, 15, (-1.0, 0.1, 20)),
    T.Q5_K: partial(_q4_or_q5_k, 31, (-0.5, 0.1, 15)),
    T.Q6_K: _q6_k,
}
_HIGH = {qtype: partial(_high_symmetric, qtype) for qtype in effort.SYMMETRIC} | {
    qtype: partial(_high_ranges, qtype) for qtype in effort.RANGES
}
_FUNCTIONS |= {qtype: partial(_codebook, qtype) for qtype in codebook.SEARCHES}
_FUNCTIONS |= {qtype: partial(_iq1, qtype) for qtype in iq1_quantize.FORMATS}
COMPILED = frozenset({T.BF16, *_FUNCTIONS})


def quantize_blocks(
    x: Tensor, weights: Tensor | None, qtype: T, out: Tensor, high: bool = False
) -> bool:
    """out (n, type_size) = the blocks of x (n, block_size), contiguous and on the CPU, like all.

    high: search as `effort.py` does. False where x holds NaN or infinity, which is looked at while
    it is in the cache; `out` is then left unfinished.
    """
    numbers, blocks = x.numpy(), out.numpy()
    if qtype == T.BF16:
        flat, halves = numbers.reshape(-1), blocks.reshape(-1).view(np.uint16)
        rounded = lambda first, end: numba_small.quantize_bf16(flat[first:end], halves[first:end])  # noqa: E731
        return all(in_threads(rounded, len(flat), 1))
    function = (_HIGH if high else _FUNCTIONS)[qtype]
    w = None if weights is None else weights.numpy()
    size = numbers.shape[1]

    @np.errstate(over="ignore")  # squares may, as in ggml
    def work(first: int, end: int) -> bool:
        for start in range(first, end, _STEP // size):
            part = slice(start, min(start + _STEP // size, end))
            if not numba_measure.all_finite(numbers[part].reshape(-1)):
                return False
            function(numbers[part], None if w is None else w[part], blocks[part])
        return True

    return all(in_threads(work, len(numbers), size))


def weigh_rows(x: Tensor, importance: Tensor) -> Tensor:
    """(rows, cols): importance·sqrt(mean square of the row + x²)."""
    out = torch.empty_like(x)
    groups.weigh_rows(x.numpy(), importance.numpy(), out.numpy())
    return out
