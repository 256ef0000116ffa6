"""The scorer finds fresh scenes right, and everything else wrong."""

import numpy as np
import pytest
from fewstep.demo.captions import COLOURS, KINDS, SHAPES, draw_captions, parse_caption
from fewstep.demo.scenes import draw, render
from fewstep.demo.score import look, rates, score
from scipy import ndimage


def pictures_of(captions, seed=0):
    drawn = draw(captions, np.random.default_rng(seed)).permute(0, 2, 3, 1).numpy()
    return (255 * drawn).round().astype(np.uint8)


def blurred(pictures, noise=0.0, seed=0):
    soft = ndimage.gaussian_filter(pictures.astype(np.float32), (0, 0.8, 0.8, 0))
    soft += np.random.default_rng(seed).normal(0, noise, soft.shape) if noise else 0
    return soft.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_scenes_are_right_clean_or_blurred_and_noisy(kind):
    captions = draw_captions(np.random.default_rng(11), 60, (kind,))
    pictures = pictures_of(captions)
    for shown in (pictures, blurred(pictures), blurred(pictures, noise=8)):
        assert all(score(*pair).right for pair in zip(shown, captions, strict=True))


def test_sizes_other_than_128():
    caption = parse_caption("a red star above a blue ring on a white background")
    picture = pictures_of([caption])[0]
    for zoom in (0.5, 2):
        other = ndimage.zoom(picture.astype(np.float32), (zoom, zoom, 1), order=1)
        assert score(other.clip(0, 255).astype(np.uint8), caption).right


@pytest.mark.parametrize("shape", SHAPES)
def test_a_wrong_shape_is_only_a_wrong_shape(shape):
    picture = pictures_of([parse_caption(f"a red {shape} on a blue background")])[0]
    for other in set(SHAPES) - {shape}:
        verdict = score(picture, f"a red {other} on a blue background")
        assert not verdict.shape and not verdict.right
        assert verdict.background and verdict.count and verdict.colour


@pytest.mark.parametrize("colour", COLOURS)
def test_a_wrong_colour_is_only_a_wrong_colour(colour):
    ground, *others = [name for name in COLOURS if name != colour]
    picture = pictures_of([parse_caption(f"a {colour} square on a {ground} background")])[0]
    for other in others:
        assert not score(picture, f"a {other} square on a {ground} background").colour
        assert not score(picture, f"a {colour} square on a {other} background").background


def test_wrong_count_and_position_are_seen():
    picture = pictures_of([parse_caption("three red stars on a white background")])[0]
    assert not score(picture, "two red stars on a white background").count
    assert not score(picture, "a red star on a white background").right
    text = "a red star {} a blue ring on a white background"
    picture = pictures_of([parse_caption(text.format("left of"))])[0]
    assert score(picture, text.format("left of")).right
    for relation in ("right of", "above", "below"):
        verdict = score(picture, text.format(relation))
        assert not verdict.position and verdict.colour and verdict.shape
    swapped = score(picture, "a blue star left of a red ring on a white background")
    assert not swapped.right


def test_objects_need_their_own_colours_and_shapes():
    picture = pictures_of([parse_caption("a red star left of a blue ring on a white background")])
    assert not score(picture[0], "a red ring left of a blue star on a white background").right


def test_smears_and_specks_are_no_picture():
    caption = parse_caption("a red circle on a white background")
    picture = pictures_of([caption])[0]
    assert score(picture, caption).right
    noise = np.random.default_rng(1).integers(0, 256, picture.shape).astype(np.uint8)
    smear = ndimage.gaussian_filter(picture.astype(np.float32), (12, 12, 0)).astype(np.uint8)
    stained = picture.copy()
    stained[::6, ::6] = 0  # specks all over the ground
    for wrong in (noise, smear, stained, np.full_like(picture, 255)):
        assert not score(wrong, caption).right


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ("star", (75, 128), (0, 60)),  # a leg
        ("star", (0, 128), (82, 128)),  # an arm
        ("cross", (0, 40), (0, 128)),  # an end
        ("ring", (58, 70), (64, 128)),  # a gap
        ("circle", (0, 45), (0, 52)),  # a bite
        ("square", (80, 128), (80, 128)),  # a corner
        ("triangle", (0, 50), (0, 128)),  # the tip
    ],
)
def test_a_missing_part_is_a_wrong_shape(shape, rows, columns):
    caption = parse_caption(f"a red {shape} on a white background")
    picture = render([caption], [[(64.0, 64.0, 38.0)]])[0].permute(1, 2, 0).numpy()
    picture = (255 * picture).round().astype(np.uint8)
    assert score(picture, caption).right
    picture[slice(*rows), slice(*columns)] = 255
    assert not score(picture, caption).right


def test_looks_at_colour_shape_and_place():
    picture = pictures_of([parse_caption("a cyan cross on a purple background")])[0]
    ground, (found,) = look(picture)
    assert (ground, found.colour, found.shape) == ("purple", "cyan", "cross")


@pytest.mark.parametrize("picture", [np.zeros((32, 32, 3), np.uint8), np.zeros((128, 128, 3))])
def test_refuses_what_is_no_picture(picture):
    with pytest.raises(ValueError, match="uint8"):
        look(picture)


def test_rates_count_each_respect():
    captions = draw_captions(np.random.default_rng(2), 4, ("single",))
    pictures = pictures_of(captions)
    pictures[0] = 128
    verdicts = [score(*pair) for pair in zip(pictures, captions, strict=True)]
    assert rates(verdicts)["right"] == 0.75 and rates(verdicts)["count"] == 0.75
