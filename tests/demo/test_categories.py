"""GenEval's categories by the exact scorer, and the Fréchet distance."""

import numpy as np
import pytest
import torch
from fewstep.demo import categories
from fewstep.demo.captions import is_held_out
from fewstep.demo.score import Verdict, score

SIX = ("single object", "two objects", "counting", "colours", "position", "attribute binding")


def as_bytes(pictures):
    return (pictures.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def captions():
    return categories.held_out(30)


def test_captions_are_held_out_and_of_every_kind(captions):
    assert all(is_held_out(caption) for caption in captions)
    assert [caption.kind for caption in captions[:4]] == ["single", "pair", "count", "single"]
    assert categories.held_out(30) == captions


def test_true_scenes_are_right_in_every_category(captions):
    pictures = as_bytes(categories.truth(captions))
    verdicts = [score(*pair) for pair in zip(pictures, captions, strict=True)]
    shares = categories.categories(captions, verdicts)
    assert shares == dict.fromkeys([*SIX, "overall", "background", "right"], 1.0)


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("colour", {"colours", "attribute binding"}),
        ("position", {"position"}),
        ("count", set(SIX)),
        ("shape", set(SIX)),
        ("background", set()),
    ],
)
def test_a_fault_counts_where_it_is_asked_for(captions, fault, wrong):
    respects = dict.fromkeys(("background", "count", "colour", "shape", "position"), True)
    verdicts = [Verdict(**respects | {fault: False})] * len(captions)
    shares = categories.categories(captions, verdicts)
    assert {name for name in SIX if shares[name] == 0} == wrong
    assert shares["overall"] == pytest.approx(1 - len(wrong) / 6) and shares["right"] == 0


def test_a_kind_that_is_missing_is_named(captions):
    singles = captions[::3]
    with pytest.raises(ValueError, match="kind pair"):
        categories.categories(singles, [Verdict(*[True] * 5)] * len(singles))


def test_frechet_is_the_closed_form_of_two_gaussians():
    """By hand: means 1 apart in one of two axes, deviations 1 and 2: 1 + 2·(1 + 4 − 2·2) = 3."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((200_000, 2))
    second = 2 * rng.standard_normal((200_000, 2)) + [1, 0]
    assert categories.frechet(first, second) == pytest.approx(3, abs=0.03)  # sampling error
    assert categories.frechet(first, first) == pytest.approx(0, abs=1e-6)


def test_distance_sees_blur(captions):
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 8, 8), torch.nn.Identity())
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.normal_().requires_grad_(False)
    true = categories.truth(captions, seed=5)
    blurred = torch.nn.functional.avg_pool2d(true, 9, 1, 4)
    seen = [categories.judge(captions, as_bytes(p), encoder)["frechet"] for p in (true, blurred)]
    assert seen[1] > 2 * seen[0]
