"""A T5 that learns to be enough: what is drawn by it alone, and what stays as it was."""

from dataclasses import asdict, replace

import pytest
import torch
from fewstep.distill.either import EitherTask
from fewstep.distill.model import CLIP, LEFT_OUT, T5
from fewstep.distill.teacher import TeacherConfig
from fewstep.tests.distill import toys
from fewstep.tests.distill.test_align import data

CONFIG = TeacherConfig(**asdict(toys.TOY), batch=16, warmup=2, ema=0.9, empty_prompt=0.0)


def task(**changes):
    made = EitherTask(replace(CONFIG, **changes), toys.WORDS, data)
    made.start_from(toys.teacher().state_dict())
    return made


@torch.no_grad()
def difference(model, short):
    """Between what it draws by T5 alone and by CLIP-L alone, of a prompt of so many tokens."""
    latents, tokens = data(99)
    alone, sigma = tokens.clone(), torch.full((len(latents),), 0.9)
    alone[:, CLIP] = LEFT_OUT
    by_clip = model(latents, sigma, tokens[:, :T5, :short])
    return (model(latents, sigma, alone[..., :short]) - by_clip).square().mean()


@pytest.mark.parametrize("short", [16, 77])
def test_it_comes_to_draw_by_t5_alone_as_by_clip(short):
    training = task(full_every=2)
    before = difference(training.drawn(), short)
    for index in range(60):
        training.step(index, 0.0)
    assert difference(training.drawn(), short) < 0.6 * before


def test_nothing_but_the_t5_changes():
    training, start = task(), toys.teacher().state_dict()
    for index in range(2):
        training.step(index, 0.0)
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, start[name]) != name.startswith("t5."), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"t5_pieces": 0}, "no T5 that could learn"),
        ({"learn": "mmdit."}, "learn is 'mmdit.', but here the T5 alone learns"),
        ({"omit_t5": 0.5}, "omit_t5 is not 0"),
        ({"drop_clip": 0.15}, "drop_clip is not 0"),
    ],
)
def test_settings_that_teach_something_else_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        task(**changes)
