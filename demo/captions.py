"""The grammar of the demo's captions: what may be said, what it means, what is kept from training.

Three kinds of sentence, each naming everything that the picture must show:

    single  a {colour} {shape} on a {colour} background
    pair    a {colour} {shape} {relation} a {colour} {shape} on a {colour} background
    count   {two|three} {colour} {shape}s on a {colour} background
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # run.py reads this file with any Python
    import numpy as np

# Far apart in RGB, and each nearest to its own CSS name.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (230, 20, 20),
    "green": (10, 160, 50),
    "blue": (20, 50, 230),
    "yellow": (255, 235, 10),
    "orange": (255, 140, 0),
    "purple": (135, 15, 150),
    "cyan": (10, 225, 235),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3}
KINDS = ("single", "pair", "count")
HELD_OUT_PERCENT = 15

GRAMMAR = f"""\
It reads "a red circle on a blue background", "a white ring left of a green square on a purple \
background" and "three orange triangles on a cyan background". Colours: {", ".join(COLOURS)}. \
Shapes: {", ".join(SHAPES)}. Relations: {", ".join(RELATIONS)}. Counts: {", ".join(COUNTS)}."""

_PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
_SINGULARS = {_PLURALS[s]: s for s in SHAPES} | {s + "s": s for s in SHAPES}
VOCABULARY = {
    *("a", "an", "on", "background", "grey", *COLOURS, *SHAPES, *COUNTS, *_SINGULARS),
    *" ".join(RELATIONS).split(),
}
_COLOUR = "(" + "|".join((*COLOURS, "grey")) + ")"
_OBJECT = f"an? {_COLOUR} ({'|'.join(SHAPES)})"
_ON = f" on an? {_COLOUR} background"
_SINGLE = re.compile(_OBJECT + _ON)
_PAIR = re.compile(f"{_OBJECT} ({'|'.join(RELATIONS)}) {_OBJECT}{_ON}")
_COUNT = re.compile(f"({'|'.join(COUNTS)}) {_COLOUR} ({'|'.join(_SINGULARS)}){_ON}")


@dataclass(frozen=True)
class Caption:
    """What a picture must show: its objects as (colour, shape), one background, one relation.

    A count caption holds the same object two or three times; only a pair has a relation, which
    says where the first object lies as seen from the second.
    """

    objects: tuple[tuple[str, str], ...]
    background: str
    relation: str | None = None

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if self.relation is not None:
            return "pair"
        return "single" if len(self.objects) == 1 else "count"

    def __str__(self) -> str:
        colour, shape = self.objects[0]
        on = f"on a {self.background} background"
        if self.kind == "single":
            return f"a {colour} {shape} {on}"
        if self.kind == "pair":
            return f"a {colour} {shape} {self.relation} a {' '.join(self.objects[1])} {on}"
        number = next(word for word, count in COUNTS.items() if count == len(self.objects))
        return f"{number} {colour} {_PLURALS[shape]} {on}"


def parse_caption(text: str) -> Caption:
    """The meaning of a sentence of the grammar; 'an', 'grey' and the plural 'crosss' count too.

    Raises ValueError for a sentence outside the grammar.
    """
    words = " ".join(text.lower().strip(" .").split())
    if match := _SINGLE.fullmatch(words):
        colour, shape, background = match.groups()
        objects, relation = ((colour, shape),), None
    elif match := _PAIR.fullmatch(words):
        colour, shape, relation, other_colour, other_shape, background = match.groups()
        objects = ((colour, shape), (other_colour, other_shape))
    elif match := _COUNT.fullmatch(words):
        number, colour, plural, background = match.groups()
        objects, relation = ((colour, _SINGULARS[plural]),) * COUNTS[number], None
    else:
        raise ValueError(f"{text!r} is not a caption of the demo's grammar; see demo/captions.py")
    objects = tuple((_spell(colour), shape) for colour, shape in objects)
    return Caption(objects, _spell(background), relation)


def is_caption(text: str) -> bool:
    """Whether a sentence is one of the grammar."""
    try:
        parse_caption(text)
    except ValueError:
        return False
    return True


def _spell(colour: str) -> str:
    return "gray" if colour == "grey" else colour


def is_held_out(caption: Caption | str) -> bool:
    """Whether a caption is kept out of training: a fixed 15 % by hash, of each kind of sentence."""
    text = str(caption if isinstance(caption, Caption) else parse_caption(caption))
    return zlib.crc32(text.encode()) % 100 < HELD_OUT_PERCENT


def random_caption(rng: np.random.Generator, kind: str) -> Caption:
    """A caption of one kind, uniform over its meanings; nothing has its background's colour."""
    background = COLOURS[rng.integers(len(COLOURS))]
    colours = [colour for colour in COLOURS if colour != background]
    things = [(colour, shape) for colour in colours for shape in SHAPES]
    if kind == "pair":
        first, second = rng.choice(len(things), size=2, replace=False)
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        return Caption((things[first], things[second]), background, relation)
    number = 1 if kind == "single" else int(rng.integers(2, 4))
    return Caption((things[rng.integers(len(things))],) * number, background)


def draw_captions(
    rng: np.random.Generator, number: int, kinds: tuple[str, ...], held_out: bool = False
) -> list[Caption]:
    """`number` captions on one side of the split, their kinds drawn uniformly from `kinds`."""
    captions = []
    while len(captions) < number:
        caption = random_caption(rng, kinds[rng.integers(len(kinds))])
        if is_held_out(caption) == held_out:
            captions.append(caption)
    return captions


def spoken(caption: Caption, rng: np.random.Generator) -> str:
    """The caption as one of the ways in which people write it: 'an orange', 'crosss', 'grey'."""
    text = str(caption)
    if rng.random() < 0.5:
        text = text.replace("a orange", "an orange")
    if rng.random() < 0.5:
        text = text.replace("crosses", "crosss")
    if rng.random() < 0.25:
        text = text.replace("gray", "grey")
    return text
