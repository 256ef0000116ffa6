"""The second scorer tells scenes as the first does, and is not taken in either."""

import numpy as np
import pytest
from fewstep.demo import score
from fewstep.demo.captions import COLOURS, KINDS, SHAPES, draw_captions, parse_caption
from fewstep.demo.second_look import look
from fewstep.tests.demo.test_score import pictures_of
from scipy import ndimage


def verdict(picture, caption):
    wanted = parse_caption(caption) if isinstance(caption, str) else caption
    return score.verdict(*look(picture), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0, 0.6])
def test_fresh_scenes_are_right_clean_or_blurred(kind, sigma):
    captions = draw_captions(np.random.default_rng(12), 60, (kind,))
    pictures = ndimage.gaussian_filter(pictures_of(captions), (0, sigma, sigma, 0))
    seen = [verdict(*pair).right for pair in zip(pictures, captions, strict=True)]
    assert sum(seen) >= (60 if sigma == 0 else 58)
    others = captions[1:] + captions[:1]
    assert not any(
        verdict(picture, other).right
        for picture, other, own in zip(pictures, others, captions, strict=True)
        if other != own
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_what_is_none(shape):
    picture = pictures_of([parse_caption(f"a red {shape} on a blue background")])[0]
    ground, (found,) = look(picture)
    assert (ground, found.colour, found.shape) == ("blue", "red", shape)
    damaged = picture.copy()
    damaged[64:, 64:] = picture[0, 0]  # a quarter is missing
    assert [one.shape for one in look(damaged)[1]] != [shape]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours(colour):
    for ground in set(COLOURS) - {colour}:
        picture = pictures_of([parse_caption(f"a {colour} square on a {ground} background")])[0]
        seen, (found,) = look(picture)
        assert (seen, found.colour, found.shape) == (ground, colour, "square")


def test_a_motley_ground_and_a_motley_object_have_no_name():
    picture = pictures_of([parse_caption("a red circle on a blue background")])[0]
    motley = picture.copy()
    motley[:64] = np.where(motley[:64] == picture[0, 0], np.uint8([0, 255, 0]), motley[:64])
    assert look(motley) == (None, [])
    half = picture.copy()
    red = (picture == picture[64, 64]).all(2)
    half[red & (np.arange(128) < 64)] = (255, 255, 255)
    assert look(half)[1][0].colour is None
