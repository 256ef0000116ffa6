"""Reading off a picture where its objects are, and drawing them anew."""

import numpy as np
import pytest
import torch
from fewstep.demo.captions import KINDS, draw_captions, parse_caption
from fewstep.demo.latents import fit_latent_code
from fewstep.demo.nearest import nearest_places
from fewstep.demo.scenes import JITTER, RADIUS, layouts, place, render
from fewstep.demo.score import score


def scenes(number, kinds):
    rng = np.random.default_rng(3)
    captions = draw_captions(rng, number, kinds)
    places = [place(caption, rng) for caption in captions]
    return captions, places, render(captions, places).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_finds_every_object_where_it_was_drawn(kind):
    for caption, places, picture in zip(*scenes(60, (kind,)), strict=True):
        assert np.allclose(nearest_places(picture, caption), places, atol=0.6), caption


def test_finds_them_in_what_the_latents_keep_of_a_picture():
    code = fit_latent_code(scenes=256)
    captions, places, pictures = scenes(60, KINDS)
    seen = code.decode(code.encode(torch.from_numpy(pictures))).numpy()
    for caption, true, picture in zip(captions, places, seen, strict=True):
        assert np.allclose(nearest_places(picture, caption), true, atol=1.5)


def test_a_faulty_picture_becomes_a_right_one_close_by():
    caption = parse_caption("a yellow star on a black background")
    picture = render([caption], [[(60.0, 66.0, 38.0)]])[0].numpy()
    picture[:, 78:] = 0  # its legs are missing
    assert not score((picture.transpose(1, 2, 0) * 255).astype(np.uint8), caption).right
    ((x, y, radius),) = nearest_places(picture, caption)
    assert abs(x - 60) < 1 and abs(y - 66) < 8 and abs(radius - 38) < 6
    mended = render([caption], [[(x, y, radius)]])[0].numpy()
    assert score((mended.transpose(1, 2, 0) * 255).astype(np.uint8), caption).right


@pytest.mark.parametrize("kind", KINDS)
def test_noise_gives_a_scene_within_the_limits(kind):
    captions = draw_captions(np.random.default_rng(5), 20, (kind,))
    noise = np.random.default_rng(6).normal(0.5, 0.5, (3, 128, 128)).astype(np.float32)
    for caption in captions:
        number = len(caption.objects)
        smallest, largest = RADIUS[number]
        found = nearest_places(noise, caption)
        assert any(
            all(
                abs(x - spot_x) <= JITTER[number]
                and abs(y - spot_y) <= JITTER[number]
                and smallest <= radius <= largest
                for (x, y, radius), (spot_x, spot_y) in zip(found, spots, strict=True)
            )
            for spots in layouts(caption)
        )


def test_an_empty_picture_gives_the_middle():
    caption = parse_caption("a red ring on a white background")
    blank = np.ones((3, 128, 128), np.float32)
    assert nearest_places(blank, caption) == [(64.0, 64.0, 37.0)]
