"""LoRA beside a weight instead of in it: y = linear(x, W) + up(down(x)).

A quantised weight need not be rewritten, nor patched and kept: the low-rank product of all LoRAs on
a weight, their ranks side by side, is a few per cent of the layer's own work. For many vectors, or
by a GPU's kernel, it is less work still to add them to the weight as that is unpacked for its
product (`merged`). What is not low-rank (LoKr, LoHa, OFT, DoRA, whole differences), or scales the
weight itself, returns None here and is added to the dequantised weight, as the host does it.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from comfy.weight_adapter import LoRAAdapter
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from ..quant import dequantize, dequantize_merged, low_rank_factors, merges_unpacking
from .layout import dense, is_gguf


@dataclass(frozen=True)
class Term:
    """One LoRA: up (rows, rank), down (rank, columns), for that part of the weight's outputs
    (`rows`) and inputs (`columns`) that its patch names.
    """

    up: Tensor
    down: Tensor
    scale: float
    rows: slice
    columns: slice


class SideBranch:
    """All LoRAs on one weight of `shape`. Their factors are joined, in the type and on the device
    of the first input that arrives, and take up their own size there.
    """

    def __init__(self, terms: list[Term], shape: tuple[int, ...]):
        self.terms, self.shape, self.parts, self.made_for = terms, shape, [], None

    @property
    def rank(self) -> int:
        return sum(len(term.down) for term in self.terms)

    @property
    def elements(self) -> int:
        """Numbers in all factors."""
        return sum(term.up.numel() + term.down.numel() for term in self.terms)

    def add(self, output: Tensor, input: Tensor) -> Tensor:
        """output (…, rows) + the LoRAs' outputs for input (…, columns); in place."""
        flat, x = output.view(-1, output.shape[-1]), input.reshape(-1, input.shape[-1])
        for rows, columns, up, down in self.joined(input):
            flat[:, rows].addmm_(x[:, columns] @ down, up)
        return output

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """All LoRAs for `multiply_many`; None if one of them concerns only a part of the weight."""
        if {(_length(term.rows), _length(term.columns)) for term in self.terms} != {self.shape}:
            return None
        _, _, up, down = _join(self.terms, torch.empty(0))
        return low_rank_factors(up.T, down.T)

    def is_less_merged(self, vectors: int) -> bool:
        """Whether, with so many vectors, `merged` takes fewer multiplications than `add`."""
        rows, columns = self.shape
        return vectors * (rows + columns) > rows * columns

    @cached_property
    def merges(self) -> bool:
        """Whether `merged` can be: no two LoRAs share some of their outputs only."""
        spans = sorted({(term.rows.start, term.rows.stop) for term in self.terms})
        whole = all(_length(term.columns) == self.shape[1] for term in self.terms)
        return whole and all(a[1] <= b[0] for a, b in pairwise(spans))

    def merges_unpacking(self, weight: Tensor, like: Tensor) -> bool:
        """Whether `merged` takes hardly longer than to unpack the weight for an input `like`."""
        if not is_gguf(weight):
            return False
        rank = max(len(up) for _, _, up, _ in self.joined(like))  # each part is added by itself
        return merges_unpacking(weight.params.qtype, like, self.shape[1], rank)

    def merged(self, weight: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight in `dtype` with the LoRAs in it, rounded once; into `out`, where given. Only
        where `merges`.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=weight.device)
        if not is_gguf(weight) or self.shape[1] % GGML_QUANT_SIZES[weight.params.qtype][0]:
            floats = dense(weight)
            exact = dtype if floats.dtype == dtype else torch.float32
            made = floats.to(exact, copy=True)
            for rows, _, up, down in self.joined(out):
                made[rows].addmm_(up.to(exact).T, down.to(exact).T)
            return out.copy_(made)
        blocks, qtype, done = weight._qdata.view(len(out), -1), weight.params.qtype, 0
        for rows, _, up, down in sorted(self.joined(out), key=lambda part: part[0].start):
            _unpack_rows(blocks, qtype, out, slice(done, rows.start))
            dequantize_merged(blocks[rows], qtype, up, down, out[rows])
            done = rows.stop
        _unpack_rows(blocks, qtype, out, slice(done, len(out)))
        return out

    def joined(self, like: Tensor) -> list[tuple[slice, slice, Tensor, Tensor]]:
        """(rows, columns, up with its scale, down) for each part of the weight: up (rank, rows) and
        down (columns, rank) as they lie in memory, which such narrow products are faster with.
        """
        if self.made_for != (like.dtype, like.device):
            parts = {}
            for term in self.terms:
                place = (term.rows.start, term.rows.stop, term.columns.start, term.columns.stop)
                parts.setdefault(place, []).append(term)
            self.parts = [_join(terms, like) for terms in parts.values()]
            self.made_for = like.dtype, like.device
        return self.parts


def _unpack_rows(blocks: Tensor, qtype: GGMLQuantizationType, out: Tensor, rows: slice) -> None:
    """Rows that no LoRA concerns, if there are any."""
    if _length(rows):
        dequantize(blocks[rows], qtype, out[rows].shape, out=out[rows])


def _join(terms: list[Term], like: Tensor):
    up = torch.cat([(term.up.float() * term.scale).T.to(like) for term in terms])
    down = torch.cat([term.down.T.to(like) for term in terms], 1)
    return terms[0].rows, terms[0].columns, up.contiguous(), down.contiguous()


def side_branch(patches: list[tuple], shape: tuple[int, ...]) -> SideBranch | None:
    """The host's `patches` of a weight of `shape` (rows, columns) as a side branch, or None if one
    of them is not of low rank.

    A patch is (strength, adapter, strength of the weight, part, function), see
    `comfy.lora.calculate_weight`, whose result this equals.
    """
    terms = [_term(patch, shape) for patch in patches]
    return None if any(term is None for term in terms) else SideBranch(terms, shape)


def _term(patch: tuple, shape: tuple[int, ...]) -> Term | None:
    strength, adapter, weight_strength, part, function = patch
    if type(adapter) is not LoRAAdapter or weight_strength != 1 or function is not None:
        return None
    up, down, alpha, middle, dora_scale, reshape = adapter.weights
    if any(extra is not None for extra in (middle, dora_scale, reshape)):
        return None
    if min(up.dim(), down.dim()) < 2:
        return None  # the host says what is wrong with it
    up, down = up.flatten(1), down.flatten(1)
    place = [slice(0, size) for size in shape]
    if part is not None:
        dim, start, length = part
        place[dim] = slice(start, start + length)
    rows, columns = place
    if (len(up), up.shape[1], down.shape[1]) != (_length(rows), len(down), _length(columns)):
        return None  # the host says what is wrong with it
    scale = strength * (1.0 if alpha is None else alpha / len(down))
    return Term(up, down, scale, rows, columns)


def _length(part: slice) -> int:
    return part.stop - part.start
