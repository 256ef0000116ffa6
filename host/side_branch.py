"""LoRA beside a weight instead of in it: y = linear(x, W) + up(down(x)).

A quantised weight need not be rewritten, nor dequantised, patched and kept: the low-rank product of
all LoRAs on a weight, their ranks side by side, is a few per cent of the layer's own work. What is
not low-rank (LoKr, LoHa, OFT, DoRA, whole differences), or scales the weight itself, returns None
here and is added to the dequantised weight, as the host does it.
"""

from dataclasses import dataclass

import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..quant import low_rank_factors


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
    """All LoRAs on one weight. Their factors are joined, in the type and on the device of the
    first input that arrives, and take up their own size there.
    """

    def __init__(self, terms: list[Term]):
        self.terms, self.joined, self.made_for = terms, [], None
        self.factors_of = None  # the weight's shape that they were made for, and they

    @property
    def rank(self) -> int:
        return sum(len(term.down) for term in self.terms)

    @property
    def elements(self) -> int:
        """Numbers in all factors."""
        return sum(term.up.numel() + term.down.numel() for term in self.terms)

    def add(self, output: Tensor, input: Tensor) -> Tensor:
        """output (…, rows) + the LoRAs' outputs for input (…, columns); in place."""
        if self.made_for != (input.dtype, input.device):
            self.joined, self.made_for = self.join(input), (input.dtype, input.device)
        flat, x = output.view(-1, output.shape[-1]), input.reshape(-1, input.shape[-1])
        for rows, columns, up, down in self.joined:
            flat[:, rows].addmm_(x[:, columns] @ down, up)
        return output

    def factors(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """All LoRAs on a weight of `shape` for `multiply_many`; None if one of them concerns only
        a part of it.
        """
        if self.factors_of is None or self.factors_of[0] != shape:
            places = {(_length(term.rows), _length(term.columns)) for term in self.terms}
            made = None
            if places == {shape}:
                _, _, up, down = _join(self.terms, torch.empty(0))
                made = low_rank_factors(up.T, down.T)
            self.factors_of = shape, made
        return self.factors_of[1]

    def join(self, like: Tensor) -> list[tuple[slice, slice, Tensor, Tensor]]:
        """(rows, columns, up with its scale, down) for each part of the weight: up (rank, rows) and
        down (columns, rank) as they lie in memory, which such narrow products are faster with.
        """
        parts = {}
        for term in self.terms:
            place = (term.rows.start, term.rows.stop, term.columns.start, term.columns.stop)
            parts.setdefault(place, []).append(term)
        return [_join(terms, like) for terms in parts.values()]


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
    return None if any(term is None for term in terms) else SideBranch(terms)


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
