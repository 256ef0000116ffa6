"""Pictures show what was placed: deterministic, smooth-edged, inside, apart."""

import numpy as np
import pytest
import torch
from fewstep.demo.captions import KINDS, PALETTE, SHAPES, draw_captions, parse_caption
from fewstep.demo.latents import CHANNELS, fit_latent_code
from fewstep.demo.scenes import SIZE, coverage, draw, place


def captions(number=60, seed=0):
    return draw_captions(np.random.default_rng(seed), number, KINDS)


def test_same_seed_same_pictures():
    first, again = (draw(captions(9), np.random.default_rng(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw(captions(9), np.random.default_rng(5)))


def test_edges_are_mixtures_and_all_else_is_flat():
    caption = parse_caption("a white circle on a black background")
    values = draw([caption], np.random.default_rng(0))[0].unique()
    assert values.min() == 0 and values.max() == 1
    assert len(values) > 50  # of the edge; a jagged one would have only 0 and 1


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_of_a_finer_drawing(shape):
    offsets = np.arange(64) + 0.5 - 31.7
    fine = (np.arange(64 * 8) + 0.5) / 8 - 31.7
    area = coverage(shape, offsets[None], offsets[:, None], 25.0).sum()
    sharp = (coverage(shape, fine[None] * 1e4, fine[:, None] * 1e4, 25e4) > 0.5).sum() / 64
    assert area == pytest.approx(sharp, rel=0.01)


def test_objects_stay_inside_and_apart():
    rng = np.random.default_rng(7)
    for caption in captions(300):
        placed = place(caption, rng)
        for x, y, radius in placed:
            assert radius <= min(x, y, SIZE - x, SIZE - y)
        for i, (x, y, radius) in enumerate(placed):
            for other_x, other_y, other_radius in placed[:i]:
                gap = max(abs(x - other_x), abs(y - other_y)) - radius - other_radius
                assert gap > 2


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_relations_hold(relation):
    caption = parse_caption(f"a red ring {relation} a blue star on a white background")
    rng = np.random.default_rng(8)
    for _ in range(50):
        (x, y, _), (other_x, other_y, _) = place(caption, rng)
        dx, dy = other_x - x, other_y - y
        ahead, aside = {
            "left of": (dx, dy),
            "right of": (-dx, dy),
            "above": (dy, dx),
            "below": (-dy, dx),
        }[relation]
        assert ahead > abs(aside)


def test_border_shows_the_background():
    pictures = draw(captions(30), np.random.default_rng(1))
    for picture, caption in zip(pictures, captions(30), strict=True):
        expected = torch.tensor(PALETTE[caption.background]) / 255
        assert torch.allclose(picture[:, 0, :], expected[:, None].expand(3, SIZE))


def test_latents_are_centred_scaled_and_keep_the_picture():
    code = fit_latent_code(seed=1, scenes=256)
    pictures = draw(captions(100, seed=3), np.random.default_rng(2))
    latents = code.encode(pictures)
    assert latents.shape == (100, CHANNELS, SIZE // 8, SIZE // 8)
    assert abs(latents.mean()) < 0.1 and 0.85 < latents.std() < 1.15
    error = (code.decode(latents) - pictures).square().mean()
    assert -10 * error.log10() > 22  # dB, by the linear inverse alone


def test_latent_code_is_deterministic():
    first, again = (fit_latent_code(seed=1, scenes=128) for _ in range(2))
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
