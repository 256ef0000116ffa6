"""Writing IQ2_XXS … IQ3_S: vectors of 4 or 8 magnitudes, each the nearest row of a fixed codebook.

A magnitude is coded 0 … levels - 1, which stands for the odd number 2·code + 1. ggml rounds a
vector to codes; where those are no row of the codebook, it looks among the rows at the least few
distances from them for the one that loses least. Layouts stand beside the readers in `iq.py`.
Source: ggml `quantize_row_iq2_xxs_impl` … `quantize_row_iq3_s_impl`, `iq2xs_init_impl`.

Where all of a sub-block is zero, ggml's IQ3_S writes the following ones to the wrong place; ours
stay where they are read.
"""

from dataclasses import dataclass
from functools import cache

import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor

from .bits import pack_planes
from .rounding import (
    divide,
    half_bytes,
    nearest_int,
    ordered_sum,
    quotient,
    square_root,
)
from .search import MAX_EPS, make_qp_quants
from .tables import grid_rows


@dataclass(frozen=True)
class Search:
    """How ggml searches for a type.

    size: weights with a scale of their own. distances: how many of the least from the codes are
    looked through. tries: steps to either side of the largest weight at the highest code, each
    `step`. eps: what counts as zero. sigma: times the mean square, in the weights. fudge: times the
    scale that is stored. even: the eighth sign follows from seven. again: which vectors are rounded
    anew for the scale found: those that were off the codebook, all of them if one was, or always.
    """

    qtype: T
    size: int
    distances: int
    tries: int
    step: float
    eps: float
    sigma: float
    fudge: float
    even: bool
    again: str = "off"

    @property
    def sub_blocks(self) -> int:
        return 256 // self.size


SEARCHES = {
    row.qtype: row
    for row in (
        Search(T.IQ3_S, 32, 3, 9, 0.2, 0.0, 2.0, 1.033, even=False, again="all"),
        Search(T.IQ3_XXS, 32, 2, 15, 0.2, 1e-8, 2.0, 1.0125, even=True),
        Search(T.IQ2_S, 16, 1, 9, 0.1, 1e-8, 2.0, 0.9875, even=False),
        Search(T.IQ2_XS, 16, 2, 9, 0.1, MAX_EPS, 1.0, 1.0, even=True),
        Search(T.IQ2_XXS, 32, 2, 6, 0.1, MAX_EPS, 1.0, 1.0, even=True, again="always"),
    )
}
NEED_IMPORTANCE = frozenset((T.IQ2_XS, T.IQ2_XXS, T.IQ1_S))  # ggml_quantize_requires_imatrix


@dataclass(frozen=True)
class Codebook:
    """rows (n, dim) int32 codes; index (levels^dim,): the row with these codes, or -1;
    near (levels^dim, width) int32: the rows to look through, nearest first, the last one repeated;
    count (levels^dim,): how many there are."""

    rows: Tensor
    index: Tensor
    near: Tensor
    count: Tensor
    levels: int

    def number(self, codes: Tensor) -> Tensor:
        """(vectors,) int64 for codes (dim, vectors)."""
        return sum(code.long() * self.levels**i for i, code in enumerate(codes))


def codebook(qtype: T, device: torch.device) -> Codebook:
    return make_codebook(qtype, SEARCHES[qtype].distances, device)


@cache
def make_codebook(qtype: T, distances: int, device: torch.device) -> Codebook:
    if device.type != "cpu":
        book = make_codebook(qtype, distances, torch.device("cpu"))
        tensors = (book.rows, book.index, book.near, book.count)
        return Codebook(*(t.to(device) for t in tensors), book.levels)
    values = grid_rows(qtype.name)
    ranks, dim = values.unique(), values.shape[1]
    rows, levels = torch.searchsorted(ranks, values).int(), len(ranks)
    powers = levels ** torch.arange(dim)
    codes = (torch.arange(levels**dim).unsqueeze(1) // powers % levels).int()
    index = torch.full((levels**dim,), -1)
    index[(rows * powers).sum(1)] = torch.arange(len(rows))
    square = rows.square().sum(1) + codes.square().sum(1, keepdim=True)
    distance = square - 2 * (codes.float() @ rows.float().t()).int()
    distance, order = distance.sort(dim=1, stable=True)
    steps = (distance.diff(dim=1) > 0).cumsum(1)  # how many distances lie before
    count = 1 + (steps < distances).sum(1)
    place = torch.arange(int(count.max())).minimum((count - 1).unsqueeze(1))
    near = order.gather(1, place).int()
    return Codebook(rows, index, near, count, levels)


def rows_of(
    book: Codebook,
    codes: Tensor,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row (vectors,) and whether it has these codes; x, w (dim, vectors), scale (vectors,).

    shift (vectors,): then a code stands for code - 1 + shift, as in IQ1, and not for 2·code + 1.
    """
    number = book.number(codes)
    row = book.index[number]
    off = (row < 0).nonzero().squeeze(1)
    near, x, w, scale = book.near[number[off]].long(), x[:, off], w[:, off], scale[off]
    best = torch.full_like(scale, torch.finfo(torch.float32).max)
    found = near[:, 0].clone()
    for column in near.t():
        q = book.rows[column].float()
        q = 2 * q + 1 if shift is None else q - 1 + shift[off].unsqueeze(1)
        diffs = [scale * q[:, i] - x[i] for i in range(len(x))]
        d2 = ordered_sum(torch.stack([w[i] * diff * diff for i, diff in enumerate(diffs)]))
        nearer = d2 < best
        best, found = torch.where(nearer, d2, best), torch.where(nearer, column, found)
    return row.index_copy(0, off, found), row >= 0


def _magnitudes(x: Tensor, w: Tensor, even: bool) -> tuple[Tensor, Tensor]:
    """|x| and signs, a byte for each eight: x, w (columns, size).

    even: the least of eight is given the other sign where the number of minuses is odd.
    """
    eights, negative = x.view(len(x), -1, 8), (x < 0).view(len(x), -1, 8)
    if even:
        odd = negative.sum(2) & 1 == 1
        loss = (w * x * x).view(eights.shape)
        least = loss.argmin(2, keepdim=True)  # the first of equals
        flip = torch.zeros_like(negative).scatter_(2, least, odd.unsqueeze(2))
        negative = negative ^ flip
    values = torch.where(negative, -eights, eights).reshape(x.shape)
    return values, pack_planes(negative.int(), 1).squeeze(-1)


def _search(search: Search, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scale (columns,), rows (columns, vectors) for magnitudes and weights (columns, size).

    And which columns are passed over, as zero.
    """
    book = codebook(search.qtype, x.device)
    dim, top = book.rows.shape[1], 2 * book.levels - 1
    columns, vectors = len(x), search.size // book.rows.shape[1]
    lanes, weights = x.t().contiguous(), w.t().contiguous()
    root = square_root(w)
    parts = [t.reshape(-1, dim).t().contiguous() for t in (x, root)]  # (dim, columns · vectors)

    def rows_for(inv: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        wide = [t.repeat_interleave(vectors) for t in (inv, scale)]
        codes = nearest_int(0.5 * (wide[0] * parts[0] - 1)).clamp_(0, book.levels - 1)
        found = rows_of(book, codes, *parts, wide[1])
        return found[0].view(columns, vectors), found[1].view(columns, vectors)

    def sums(rows: Tensor) -> tuple[Tensor, Tensor]:
        q = (2 * book.rows[rows] + 1).float().view(columns, -1).t()
        return ordered_sum(weights * lanes * q), ordered_sum(weights * q * q)

    amax = lanes.amax(0)
    zero = amax < search.eps if search.eps else amax == 0
    if search.again == "always":
        scale, _ = make_qp_quants(lanes, book.levels + 1, weights)
        amax = scale * book.levels
        zero = zero | (amax <= 0)
    else:
        scale = divide(amax, top)
    rows = torch.zeros(columns, vectors, dtype=torch.int64, device=x.device)
    on = torch.full_like(rows, search.again == "off", dtype=torch.bool)
    best = torch.zeros_like(scale)
    step = torch.tensor(search.step, dtype=torch.float32)
    for k in range(-search.tries, search.tries + 1):
        inv = quotient(float(top + k * step), amax)
        tried, hits = rows_for(inv, quotient(1.0, inv))
        sumqx, sumq2 = sums(tried)
        better = (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
        scale = torch.where(better, sumqx / sumq2, scale)
        best = torch.where(better, scale * sumqx, best)
        rows = torch.where(better.unsqueeze(1), tried, rows)
        on = torch.where(better.unsqueeze(1), hits, on)
    anew = ~on
    if search.again == "all":
        anew = anew.any(1, keepdim=True).expand_as(anew)
    elif search.again == "always":
        anew = torch.ones_like(anew)
    anew = anew & (scale > 0).unsqueeze(1)
    rows = torch.where(anew, rows_for(quotient(1.0, scale), scale)[0], rows)
    sumqx, sumq2 = sums(rows)
    scale = torch.where(anew.any(1) & (sumq2 > 0), sumqx / sumq2, scale)
    return scale.masked_fill(zero, 0.0), rows.masked_fill(zero.unsqueeze(1), 0), zero


def _weights(search: Search, x: Tensor, importance: Tensor | None) -> Tensor:
    squares = x * x
    sigma2 = (search.sigma * ordered_sum(squares.t()) / 256).unsqueeze(1)
    if importance is not None:
        return importance * square_root(sigma2 + squares)
    return 0.25 * sigma2 + squares if search.qtype == T.IQ2_S else squares


def find(qtype: T, x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `pack` takes, for x (n, 256) float32."""
    search = SEARCHES[qtype]
    w = _weights(search, x, importance).view(-1, search.size)
    values, signs = _magnitudes(x.reshape(-1, search.size), w, search.even)
    scales, rows, zero = _search(search, values, w)
    return scales, zero, signs, rows


def pack(qtype: T, scales: Tensor, zero: Tensor, signs: Tensor, rows: Tensor) -> Tensor:
    """(n, type_size) uint8 of scales (columns,) float32, of which `zero` (columns,) bool are passed
    over, signs (columns, eights) uint8 and codebook rows (columns, vectors) of any integer dtype.
    """
    search, n = SEARCHES[qtype], rows.numel() // (256 // codebook(qtype, rows.device).rows.shape[1])
    mask = 0x7F if search.even else 0xFF
    signs = torch.where((scales < 0).unsqueeze(1), ~signs, signs) & mask
    if search.even:  # then a super-block without a scale is all zero
        zero = zero | (scales.view(n, -1) == 0).all(1).repeat_interleave(search.sub_blocks)
    rows = rows.masked_fill(zero.unsqueeze(1), 0)
    signs = signs.masked_fill_(zero.unsqueeze(1), 0)
    scales = scales.abs().view(n, -1)
    d = divide(scales.amax(1), 31)
    sc = nearest_int(0.5 * (quotient(1.0, d).unsqueeze(1) * scales - 1)).clamp_(0, 15)
    sc = sc.masked_fill_((d == 0).unsqueeze(1), 0)
    fudge = torch.tensor(search.fudge, dtype=torch.float32, device=scales.device)
    rows = rows.view(n, -1).int()
    return _LAYOUTS[qtype](half_bytes(d * fudge), sc, signs.view(n, 32), rows)


def _words(x: Tensor) -> Tensor:
    """(n, w) int32 or int16 -> (n, bytes) uint8"""
    return x.contiguous().view(torch.uint8)


def _signs_and_scales(signs: Tensor, sc: Tensor) -> Tensor:
    """(n, 32) and (n, 8) -> (n, 8) int32: four times seven signs, and the scale on top."""
    shifts = torch.tensor((0, 7, 14, 21), dtype=torch.int32, device=signs.device)
    return (signs.int().view(-1, 8, 4) << shifts).sum(2, dtype=torch.int32) | (sc << 28)


def _lay_out_iq3_s(d: Tensor, sc: Tensor, signs: Tensor, rows: Tensor) -> Tensor:
    """(n, 110) uint8"""
    high = pack_planes((rows >> 8).view(-1, 8, 8), 1).flatten(1)
    nibbles = pack_planes(sc.view(-1, 4, 2), 4).flatten(1)
    return torch.cat((d, (rows & 0xFF).byte(), high, signs.byte(), nibbles), 1)


def _lay_out_iq3_xxs(d: Tensor, sc: Tensor, signs: Tensor, rows: Tensor) -> Tensor:
    """(n, 98) uint8"""
    return torch.cat((d, rows.byte(), _words(_signs_and_scales(signs, sc))), 1)


def _lay_out_iq2_s(d: Tensor, sc: Tensor, signs: Tensor, rows: Tensor) -> Tensor:
    """(n, 82) uint8"""
    high = pack_planes((rows >> 8).view(-1, 8, 4), 2).flatten(1)
    nibbles = pack_planes(sc.view(-1, 8, 2), 4).flatten(1)
    return torch.cat((d, (rows & 0xFF).byte(), signs.byte(), high, nibbles), 1)


def _lay_out_iq2_xs(d: Tensor, sc: Tensor, signs: Tensor, rows: Tensor) -> Tensor:
    """(n, 74) uint8"""
    words = (rows | (signs.int() << 9)).to(torch.int16)
    nibbles = pack_planes(sc.view(-1, 8, 2), 4).flatten(1)
    return torch.cat((d, _words(words), nibbles), 1)


def _lay_out_iq2_xxs(d: Tensor, sc: Tensor, signs: Tensor, rows: Tensor) -> Tensor:
    """(n, 66) uint8"""
    words = _words(_signs_and_scales(signs, sc)).view(-1, 8, 4)
    pairs = torch.cat((rows.byte().view(-1, 8, 4), words), 2)
    return torch.cat((d, pairs.flatten(1)), 1)


_LAYOUTS = {
    T.IQ3_S: _lay_out_iq3_s,
    T.IQ3_XXS: _lay_out_iq3_xxs,
    T.IQ2_S: _lay_out_iq2_s,
    T.IQ2_XS: _lay_out_iq2_xs,
    T.IQ2_XXS: _lay_out_iq2_xxs,
}


def quantize_blocks(x: Tensor, importance: Tensor | None = None, *, qtype: T) -> Tensor:
    """(n, 256) float32 -> (n, type_size) uint8."""
    return pack(qtype, *find(qtype, x, importance))
