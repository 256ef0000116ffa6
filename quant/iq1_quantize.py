"""Writing IQ1_S and IQ1_M: vectors of 8 levels -1, 0 and 1, all moved up or down by an eighth.

Sorted, a sub-block's weights are split among the three levels at two places. ggml tries all such
places with all shifts, and takes what loses least; a vector of levels that is no row of the
codebook gives way to the best of the rows around it. Layouts stand beside the readers in `iq.py`.
Source: ggml `quantize_row_iq1_s_impl`, `quantize_row_iq1_m_impl`.

Like ggml, IQ1_M takes weights without an importance. A sub-block that counts as zero is given the
codebook's row 0 at the least scale, since no level is zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor

from .bits import pack_planes
from .codebook import Codebook, make_codebook, rows_of
from .rounding import divide, half_bytes, nearest_int, ordered_sum, quotient, square_root

_DELTA = 0.125
_DISTANCES = 3  # how many of the least from the levels are looked through
_TILE = 2**10  # super-blocks at a time: IQ1_M's search holds 24 numbers for each weight


@dataclass(frozen=True)
class Format:
    """size: weights with a scale of their own. eps: what counts as zero. fudge: times the scale
    that is stored. down: for each choice of shifts, which of a sub-block's vectors are moved down;
    the last is the opposite of the first, and so on.
    """

    size: int
    eps: float
    fudge: float
    down: tuple[tuple[int, ...], ...]


FORMATS = {
    T.IQ1_S: Format(32, 1e-12, 1.125, ((0, 0, 0, 0), (1, 1, 1, 1))),
    T.IQ1_M: Format(16, 1e-7, 1.1125, ((0, 0), (0, 1), (1, 0), (1, 1))),
}


def book(device: torch.device) -> Codebook:
    """The 2048 rows that both types share."""
    return make_codebook(T.IQ1_S, _DISTANCES, device)


def _shifts(down: Tensor) -> Tensor:
    return torch.where(down != 0, -_DELTA, _DELTA)


def _splits_of_sums(x: Tensor, w: Tensor) -> Iterator[tuple[int, int, list[tuple[Tensor, Tensor]]]]:
    """IQ1_S: both places and, for each shift, the sums of w·q·x and w·q²; x, w (size, columns)."""
    size = len(x)
    sums = [torch.zeros_like(torch.stack((x[0], w[0])))]
    for step in torch.stack((w * x, w), 1):
        sums.append(sums[-1] + step)
    for low in range(size + 1):
        for high in range(low, size + 1):
            parts = sums[low], sums[high] - sums[low], sums[size] - sums[high]
            found = []
            for shift in (_DELTA, -_DELTA):
                q = shift - 1, shift, shift + 1
                sumqx = parts[0][0] * q[0] + parts[1][0] * q[1] + parts[2][0] * q[2]
                squares = [part[1] * value * value for part, value in zip(parts, q, strict=True)]
                found.append((sumqx, squares[0] + squares[1] + squares[2]))
            yield low, high, found


def _splits_of_terms(
    x: Tensor, w: Tensor, down: Tensor
) -> Iterator[tuple[int, int, list[tuple[Tensor, Tensor]]]]:
    """IQ1_M: as above, each sum taken term by term; down (choices, size, columns)."""
    terms, size = [], len(x)
    for level in (-1, 0, 1):
        q = level + _shifts(down)
        terms.append(torch.stack((w * q * x, w * q * q)).unbind(2))
    before = torch.zeros_like(terms[0][0])
    for low in range(size + 1):
        between = before
        for high in range(low, size + 1):
            sumqx, sumq2 = sum(terms[2][high:], start=between)
            yield low, high, list(zip(sumqx, sumq2, strict=True))
            if high < size:
                between = between + terms[1][high]
        if low < size:
            before = before + terms[0][low]


def _best_split(qtype: T, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For x, w (columns, size): scale, the choice of shifts, levels 0 … 2 (columns, size) int32.

    And whether there is one at all, which needs a weight above zero.
    """
    down = torch.tensor(FORMATS[qtype].down, device=x.device)
    values, order = (x + 0.0).sort(dim=1, stable=True)  # no negative zero: equals keep their order
    lanes, weights = values.t().contiguous(), w.gather(1, order).t().contiguous()
    if qtype == T.IQ1_S:
        splits = _splits_of_sums(lanes, weights)
    else:
        splits = _splits_of_terms(lanes, weights, down[:, order.t() // 8])
    scale = x.abs().amax(1)
    best = torch.full_like(scale, -torch.finfo(torch.float32).max)
    found = torch.full((3, len(x)), -1, dtype=torch.int32, device=x.device)
    for low, high, sums in splits:
        for choice, (sumqx, sumq2) in enumerate(sums):
            better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
            scale = torch.where(better, sumqx / sumq2, scale)
            best = torch.where(better, scale * sumqx, best)
            for row, number in zip(found, (low, high, choice), strict=True):
                row.masked_fill_(better, number)
    low, high, choice = found
    place = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    split = (place >= low.unsqueeze(1)).int() + (place >= high.unsqueeze(1)).int()
    levels = torch.zeros_like(split).scatter_(1, order, split)
    below = scale < 0
    levels = torch.where(below.unsqueeze(1), 2 - levels, levels)
    choice = torch.where(below, len(down) - 1 - choice, choice)
    return scale.abs(), choice, levels, choice >= 0


def _values(rows: Tensor, down: Tensor) -> Tensor:
    """(vectors, 8) float32: what rows (vectors,) and shifts stand for."""
    return book(rows.device).rows[rows].float() - 1 + _shifts(down).unsqueeze(1)


def _search(qtype: T, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scale (columns,), rows and shifts down (columns, vectors) for x, w (columns, size)."""
    row = FORMATS[qtype]
    scale, choice, levels, some = _best_split(qtype, x, w)
    some = some & ~(x.abs().amax(1) < row.eps)
    down = torch.tensor(row.down, device=x.device)[choice.clamp_(min=0).long()]
    vectors = row.size // 8
    parts = [t.reshape(-1, 8).t().contiguous() for t in (levels, x, w)]
    wide, shifts = scale.repeat_interleave(vectors), _shifts(down.flatten())
    rows, on = rows_of(book(x.device), *parts, wide, shifts)
    q = _values(rows, down.flatten()).view(x.shape)
    sumqx, sumq2 = ordered_sum((w * q * x).t()), ordered_sum((w * q * q).t())
    fitted = ~on.view(-1, vectors).all(1) & (sumqx > 0) & (sumq2 > 0)
    scale = torch.where(fitted, sumqx / sumq2, scale)
    none = ~some.unsqueeze(1)
    rows, down = rows.view(-1, vectors).masked_fill(none, 0), down.masked_fill(none, 0)
    return scale.masked_fill(~some, 0.0), rows, down


def weigh(x: Tensor, importance: Tensor | None) -> Tensor:
    """(n, 256): how much each squared error counts."""
    squares = x * x
    if importance is None:
        return squares
    sigma2 = (2 * ordered_sum(squares.t()) / 256).unsqueeze(1)
    return importance * square_root(sigma2 + squares)


def pack(qtype: T, found: tuple[Tensor, Tensor, Tensor], x: Tensor, w: Tensor) -> Tensor:
    """(n, type_size) uint8 of scales (columns,) float32, rows and shifts down (columns, vectors) of
    any integer dtype, found for x, w (n, 256).
    """
    row, n = FORMATS[qtype], len(x)
    scales, rows, down = found[0].view(n, -1), found[1].view(n, -1), found[2].view(n, -1)
    largest = scales.amax(1)
    d, flat = divide(largest, 15), (largest == 0).unsqueeze(1)
    sc = nearest_int(0.5 * (quotient(1.0, d).unsqueeze(1) * scales - 1)).clamp_(0, 7)
    sc, down = sc.masked_fill_(flat, 0), down.masked_fill(flat, 0)
    if qtype == T.IQ1_M:
        d = torch.where(flat[:, 0], 0.0, _fit(d, sc, rows, down, x, w))
    fudge = torch.tensor(row.fudge, dtype=torch.float32, device=d.device)
    layout = _lay_out_iq1_s if qtype == T.IQ1_S else _lay_out_iq1_m
    return layout(half_bytes(d * fudge), sc, rows.int(), down.int())


def _fit(d: Tensor, sc: Tensor, rows: Tensor, down: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """d (n,) that loses least with all else as it will be stored."""
    q = _values(rows.flatten().long(), down.flatten()).view(len(x), sc.shape[1], -1)
    q = (q * (2 * sc + 1).unsqueeze(2)).view(x.shape)
    sumqx, sumq2 = ordered_sum((w * q * x).t()), ordered_sum((w * q * q).t())
    return torch.where(sumq2 > 0, sumqx / sumq2, d)


def _shifted(fields: Tensor, bits: int) -> Tensor:
    """(…,) int32: fields (…, count) joined, `bits` apart, the first lowest."""
    places = torch.arange(fields.shape[-1], dtype=torch.int32, device=fields.device) * bits
    return (fields << places).sum(-1, dtype=torch.int32)


def _lay_out_iq1_s(d: Tensor, sc: Tensor, rows: Tensor, down: Tensor) -> Tensor:
    """(n, 50) uint8"""
    high = _shifted((rows >> 8).view(-1, 8, 4), 3)
    qh = high | (sc << 12) | (down.view(-1, 8, 4)[..., 0] << 15)
    return torch.cat((d, (rows & 0xFF).byte(), qh.to(torch.int16).view(torch.uint8)), 1)


def _lay_out_iq1_m(d: Tensor, sc: Tensor, rows: Tensor, down: Tensor) -> Tensor:
    """(n, 56) uint8"""
    high = pack_planes(((rows >> 8) | (down << 3)).view(-1, 16, 2), 4)
    nibbles = torch.stack((d & 0x0F, d >> 4), 2).flatten(1).int()
    words = _shifted(sc.view(-1, 4, 4), 3) | (nibbles << 12)
    return torch.cat(((rows & 0xFF).byte(), high, words.to(torch.int16).view(torch.uint8)), 1)


def quantize_blocks(x: Tensor, importance: Tensor | None = None, *, qtype: T) -> Tensor:
    """(n, 256) float32 -> (n, type_size) uint8."""
    blocks, size, w = [], FORMATS[qtype].size, weigh(x, importance)
    for values, weights in zip(x.split(_TILE), w.split(_TILE), strict=True):
        found = _search(qtype, values.reshape(-1, size), weights.view(-1, size))
        blocks.append(pack(qtype, found, values, weights))
    return torch.cat(blocks)


quantize_iq1_s = partial(quantize_blocks, qtype=T.IQ1_S)
quantize_iq1_m = partial(quantize_blocks, qtype=T.IQ1_M)
