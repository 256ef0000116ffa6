"""Looks: the same scene, drawn another way."""

import numpy as np
import torch
from fewstep.demo.captions import parse_caption
from fewstep.demo.scenes import place, render
from fewstep.demo.score import score
from fewstep.demo.styles import LINE, ink, outline

CAPTIONS = [
    parse_caption("a red square on a blue background"),
    parse_caption("two white stars on a green background"),
]
PLACES = [place(caption, np.random.default_rng(1)) for caption in CAPTIONS]


def test_an_outline_is_a_line_around_what_was_filled():
    plain, drawn = render(CAPTIONS, PLACES), outline(CAPTIONS, PLACES)
    (x, y, radius) = PLACES[0][0]
    inside, background = drawn[0, :, int(y), int(x)], plain[0, :, 0, 0]
    assert (inside == background).all() and not (plain[0, :, int(y), int(x)] == background).all()
    edge = int(x - 0.88 * radius + LINE / 2)
    assert (drawn[0, :, int(y), edge] == plain[0, :, int(y), edge]).all()
    assert 0.1 < (drawn[0, 0] > 0.5).sum() / (plain[0, 0] > 0.5).sum() < 0.5


def test_ink_is_black_on_white_in_the_same_places():
    plain, drawn = render(CAPTIONS, PLACES), ink(CAPTIONS, PLACES)
    bytes_of = (drawn[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    assert score(bytes_of, parse_caption("a black square on a white background")).right
    (x, y, _) = PLACES[0][0]
    covered = (plain != plain[:, :, :1, :1]).any(1)
    assert torch.equal(covered, (drawn < 1).any(1)) and drawn[0, :, int(y), int(x)].max() < 0.2
