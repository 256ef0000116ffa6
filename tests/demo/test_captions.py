"""The grammar says each meaning in one way, reads several, and splits by a fixed hash."""

import numpy as np
import pytest
from fewstep.demo.captions import (
    COLOURS,
    KINDS,
    SHAPES,
    VOCABULARY,
    Caption,
    draw_captions,
    is_held_out,
    parse_caption,
    spoken,
)

SINGLES = [
    Caption(((colour, shape),), background)
    for colour in COLOURS
    for shape in SHAPES
    for background in COLOURS
    if colour != background
]


@pytest.mark.parametrize(
    "text",
    [
        "a red circle on a blue background",
        "a orange star left of a gray ring on a white background",
        "three cyan crosses on a black background",
    ],
)
def test_reads_what_it_writes(text):
    assert str(parse_caption(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_way_of_saying_it(kind):
    rng = np.random.default_rng(3)
    for caption in draw_captions(rng, 200, (kind,)):
        said = spoken(caption, rng)
        assert parse_caption(said) == caption
        assert set(said.split()) <= VOCABULARY
        assert caption.kind == kind


@pytest.mark.parametrize("text", ["", "a red dog on a blue background", "a red circle"])
def test_refuses_what_the_grammar_does_not_know(text):
    with pytest.raises(ValueError, match="grammar"):
        parse_caption(text)


def test_objects_differ_from_background_and_from_each_other():
    for caption in draw_captions(np.random.default_rng(1), 500, KINDS):
        assert all(colour != caption.background for colour, _ in caption.objects)
        assert caption.kind != "pair" or caption.objects[0] != caption.objects[1]


def test_split_is_fixed_and_about_fifteen_percent_of_each_kind():
    assert is_held_out("a red circle on a blue background") == is_held_out(
        "A  red circle on a blue background."
    )
    assert 0.12 < np.mean([is_held_out(caption) for caption in SINGLES]) < 0.18
    rng = np.random.default_rng(2)
    for kind in KINDS:
        assert not any(map(is_held_out, draw_captions(rng, 100, (kind,))))
        assert all(map(is_held_out, draw_captions(rng, 20, (kind,), held_out=True)))


def test_every_colour_and_shape_occurs_on_both_sides():
    for side in (True, False):
        captions = [caption for caption in SINGLES if is_held_out(caption) == side]
        assert {caption.objects[0] for caption in captions} >= {
            (colour, shape) for colour in COLOURS for shape in SHAPES if not side
        }
        assert {caption.background for caption in captions} == set(COLOURS)
