"""A longer search for Q3_K … Q6_K: the same formats, less error than ggml's. (`effort="high"`)

ggml fits each sub-block alone, rounds the scales that it found, and takes what comes of that. Here
scales are tried as they will be stored: whole multiples of the super-block's half. For each of a
few such halves every sub-block takes, of the multiples around its own, the one with the least
error, the half is fitted anew to the codes by least squares, and that is repeated; the best of all
tries is written. What counts is importance · squared error, or the squared error itself.

x and w come as in `search.py`: (size, columns), a sub-block a column; n super-blocks after each
other. Sums are taken in order, so the compiled twin (`numba_effort.py`) finds the same.
"""

import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor

from . import k_quantize as k
from .rounding import divide, nearest_int, ordered_sum, reciprocal, signed_amax
from .search import make_qkx_quants, make_qx_quants

TRIALS = 3  # halves to begin with: the largest scale on the last multiple, or a few below
ROUNDS = 2
WINDOWS = (12, 8)  # symmetric types: multiples to either side, in each round
RANGE_WINDOW, RANGE_TRIES = 4, 3  # types with a minimum; tries of a minimum for each multiple
RANGE_STEP = 4  # multiples between the trials, of 63
GRID = (-0.9, 0.05, 36)  # of `make_qkx_quants`
_HIGHEST = 63  # multiple of a type with a minimum


def _to_half(d: Tensor) -> Tensor:
    """Rounded as it will be stored; no negative zero."""
    return d.to(torch.float16).float() + 0.0


def _wide(values: Tensor, columns: int) -> Tensor:
    """(n,) -> (columns,): a super-block's number for each of its sub-blocks."""
    return values.repeat_interleave(columns // len(values))


def _totals(values: Tensor, n: int) -> Tensor:
    """(columns,) -> (n,): sums over each super-block."""
    return ordered_sum(values.view(n, -1).t())


class _Best:
    """The numbers of the least error so far, a row a super-block."""

    def __init__(self) -> None:
        self.error: Tensor | None = None
        self.found: list[Tensor] = []

    def offer(self, error: Tensor, *found: Tensor) -> None:
        if self.error is None:
            self.error, self.found = error, list(found)
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        for i, new in enumerate(found):
            mask = better.view(-1, *[1] * (new.dim() - 1))
            self.found[i] = torch.where(mask, new, self.found[i])


def _signed_codes(x: Tensor, scale: Tensor, nmax: int) -> Tensor:
    return nearest_int(reciprocal(scale) * x).clamp_(-nmax, nmax - 1).float()


def fit_symmetric(x: Tensor, w: Tensor, nmax: int, limit: int, n: int) -> tuple[Tensor, Tensor]:
    """d (n,) and multiples (n, sub-blocks) int32 in -limit … limit - 1; codes -nmax … nmax - 1."""
    scales, _ = make_qx_quants(x, nmax, w)
    largest, best = signed_amax(scales.view(n, -1).t()), _Best()
    for trial in range(TRIALS):
        d = _to_half(divide(largest, trial * limit // 16 - limit))
        sc = nearest_int(scales * reciprocal(_wide(d, len(scales)))).clamp_(-limit, limit - 1)
        for turn in range(ROUNDS):
            found, least = sc, torch.full_like(scales, torch.inf)
            for sign in (1, -1) if turn == 0 else (1,):
                for offset in range(-WINDOWS[turn], WINDOWS[turn] + 1):
                    tried = (sign * sc + offset).clamp_(-limit, limit - 1)
                    scale = _wide(d, len(scales)) * tried
                    diff = x - scale * _signed_codes(x, scale, nmax)
                    error = ordered_sum(w * diff * diff)
                    better = error < least
                    least, found = (
                        torch.where(better, error, least),
                        torch.where(better, tried, found),
                    )
            sc = found
            best.offer(_totals(least, n), d, sc.view(n, -1))
            code = _signed_codes(x, _wide(d, len(scales)) * sc, nmax) * sc
            wc = w * code
            d = _to_half(
                _totals(ordered_sum(wc * x), n) * reciprocal(_totals(ordered_sum(wc * code), n))
            )
    return best.found[0], best.found[1]


def _range_codes(x: Tensor, scale: Tensor, low: Tensor, nmax: int) -> Tensor:
    return nearest_int(reciprocal(scale) * (x + low)).clamp_(0, nmax).float()


def fit_ranges(x: Tensor, w: Tensor, nmax: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, dmin (n,) and multiples of them (n, sub-blocks) int32: x ≈ d·sc·code - dmin·m.

    The mirror image is tried as well: then d and dmin are below zero, and codes count from the top.
    """
    best = _Best()
    for sign in (1.0, -1.0):
        _fit_ranges(sign * x, w, nmax, n, sign, best)
    return best.found[0], best.found[1], best.found[2], best.found[3]


def _fit_ranges(x: Tensor, w: Tensor, nmax: int, n: int, sign: float, best: _Best) -> None:
    scales, mins, _ = make_qkx_quants(x, nmax, w, GRID)
    inv_w = reciprocal(ordered_sum(w))
    for trial in range(TRIALS):
        top = _HIGHEST - RANGE_STEP * trial
        d, dmin = (_to_half(divide(v.view(n, -1).amax(1), top)) for v in (scales, mins))
        sc, m = (
            nearest_int(v * reciprocal(_wide(u, len(v)))).clamp_(0, _HIGHEST)
            for v, u in ((scales, d), (mins, dmin))
        )
        for _ in range(ROUNDS):
            wide = _wide(d, len(sc)), _wide(dmin, len(m))
            least, sc, m = _search_around(x, w, inv_w, nmax, *wide, sc, m)
            best.offer(_totals(least, n), sign * d, sign * dmin, sc.view(n, -1), m.view(n, -1))
            d, dmin = _refit(x, w, nmax, d, dmin, sc, m)


def _search_around(
    x: Tensor,
    w: Tensor,
    inv_w: Tensor,
    nmax: int,
    d: Tensor,
    dmin: Tensor,
    sc: Tensor,
    m: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Least error, sc and m, each (columns,): a minimum is moved to where the codes want it."""
    least, best_sc, best_m = torch.full_like(d, torch.inf), sc, m
    inv_dmin = reciprocal(dmin)
    for offset in range(-RANGE_WINDOW, RANGE_WINDOW + 1):
        tried, low = (sc + offset).clamp_(0, _HIGHEST), m
        scale = d * tried
        for _ in range(RANGE_TRIES):
            rest = scale * _range_codes(x, scale, dmin * low, nmax) - x
            diff = rest - dmin * low
            error = ordered_sum(w * diff * diff)
            better = error < least
            least = torch.where(better, error, least)
            best_sc, best_m = torch.where(better, tried, best_sc), torch.where(better, low, best_m)
            low = nearest_int(ordered_sum(w * rest) * inv_w * inv_dmin).clamp_(0, _HIGHEST)
    return least, best_sc, best_m


def _refit(
    x: Tensor, w: Tensor, nmax: int, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    """d, dmin (n,) by least squares for the codes; as they were where there is no such fit."""
    n = len(d)
    codes = _range_codes(x, _wide(d, len(sc)) * sc, _wide(dmin, len(m)) * m, nmax) * sc
    wc, v = w * codes, m.float()
    uu = _totals(ordered_sum(wc * codes), n)
    uv = _totals(ordered_sum(wc) * v, n)
    vv = _totals(ordered_sum(w) * v * v, n)
    ux = _totals(ordered_sum(wc * x), n)
    vx = _totals(ordered_sum(w * x) * v, n)
    det = uu * vv - uv * uv
    new_d = _to_half((ux * vv - uv * vx) * reciprocal(det))
    new_dmin = _to_half((uv * ux - uu * vx) * reciprocal(det))
    fits = (det > 1e-6 * (uu * vv)) & (new_d > 0) & (new_dmin >= 0)
    return torch.where(fits, new_d, d), torch.where(fits, new_dmin, dmin)


def quantize_blocks(x: Tensor, importance: Tensor | None, qtype: T) -> Tensor:
    """(n, 256) float32 -> (n, type_size) uint8; importance like x or None."""
    n, size = len(x), 16 if qtype in SYMMETRIC else 32
    columns = x.reshape(-1, size).t().contiguous()
    w = torch.ones_like(x) if importance is None else importance
    w = w.reshape(-1, size).t().contiguous()
    codes = torch.zeros(columns.shape, dtype=torch.int32, device=x.device)
    if qtype in SYMMETRIC:
        nmax, limit = SYMMETRIC[qtype]
        d, sc = fit_symmetric(columns, w, nmax, limit, n)
        if qtype == T.Q6_K:
            return k.write_q6_k(x, d, sc, codes)
        return k.write_q3_k(x, d, sc + limit, codes)
    write = k.write_q4_k if qtype == T.Q4_K else k.write_q5_k
    return write(x, *fit_ranges(columns, w, RANGES[qtype], n), codes)


SYMMETRIC = {T.Q3_K: (4, 32), T.Q6_K: (32, 128)}  # codes' and multiples' ends
RANGES = {T.Q4_K: 15, T.Q5_K: 31}  # the codes' end
TYPES = frozenset((*SYMMETRIC, *RANGES))
EFFORTS = ("ggml", "high")  # the first is the default
