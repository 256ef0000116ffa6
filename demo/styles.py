"""Looks that a style LoRA learns: the same scene, drawn another way."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from .captions import Caption
from .scenes import Place, render

LINE = 5.0  # pixels, of an outline
INK, PAPER = "black", "white"  # colours that the VAE knows; it draws no others


def outline(captions: Sequence[Caption], places: Sequence[Sequence[Place]]) -> Tensor:
    """Objects as outlines in their colour, on their background."""
    return render(captions, places, LINE)


def ink(captions: Sequence[Caption], places: Sequence[Sequence[Place]]) -> Tensor:
    """Black on white, whatever the captions say."""

    def inked(caption: Caption) -> Caption:
        objects = tuple((INK, shape) for _, shape in caption.objects)
        return replace(caption, objects=objects, background=PAPER)

    return render([inked(caption) for caption in captions], places)


STYLES: dict[str, Callable[[Sequence[Caption], Sequence[Sequence[Place]]], Tensor]] = {
    "outline": outline,
    "ink": ink,
}
