"""Looks that a style LoRA learns: the same scene, drawn another way."""

from collections.abc import Callable, Sequence

from torch import Tensor

from .captions import Caption
from .scenes import Place, render

LINE = 5.0  # pixels, of an outline
PALE = 0.5  # share of white in a pastel


def outline(captions: Sequence[Caption], places: Sequence[Sequence[Place]]) -> Tensor:
    """Objects as outlines in their colour, on their background."""
    return render(captions, places, LINE)


def pastel(captions: Sequence[Caption], places: Sequence[Sequence[Place]]) -> Tensor:
    """Every colour half-way to white."""
    return PALE + (1 - PALE) * render(captions, places)


STYLES: dict[str, Callable[[Sequence[Caption], Sequence[Sequence[Place]]], Tensor]] = {
    "outline": outline,
    "pastel": pastel,
}
