"""A new T5 that learns to say what CLIP-L says."""

from dataclasses import asdict, replace

import torch
from fewstep.distill.align import AlignTask
from fewstep.distill.teacher import TeacherConfig
from fewstep.tests.distill import toys

CONFIG = TeacherConfig(**asdict(toys.TOY), batch=16, warmup=2)


def data(index):
    """Words that are the same to both: T5's id follows from CLIP's."""
    latents, tokens = toys.data(index, 16)
    tokens[:, 0, 1:4] = tokens[:, 0, 1:4] % 5 + 320
    tokens[:, 1, :3] = tokens[:, 0, 1:4] - 317
    return latents, tokens


def task(seed=0):
    made = AlignTask(replace(CONFIG, seed=seed), toys.WORDS, data, widths=[1] * 8)
    weights = toys.teacher().state_dict()
    weights["mmdit.context_embedder.weight"][:, 32:] = 0  # as of a model that never had a T5
    made.start_from(weights)
    return made


def test_t5_comes_to_be_read_as_clip_is():
    training = task()
    losses = [training.step(i, 0.0).item() for i in range(60)]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


def test_the_t5_is_a_new_one():
    learned = task(seed=1).model.state_dict()
    start = toys.teacher().state_dict()
    assert not torch.equal(learned["t5.shared.weight"], start["t5.shared.weight"])
    assert torch.equal(learned["text.table"], start["text.table"])


def test_nothing_but_the_t5_and_its_columns_changes():
    training, start = task(), toys.teacher().state_dict()
    for i in range(2):
        training.step(i, 0.0)
    for name, value in training.model.state_dict().items():
        if name == "mmdit.context_embedder.weight":
            assert torch.equal(value[:, :32], start[name][:, :32]) and value[:, 32:].any()
            assert torch.equal(value, training.ema[name])
        else:
            assert torch.equal(value, start[name]) != name.startswith("t5."), name


def test_a_word_is_compared_with_its_last_token():
    """Pieces 3 and 4 are one token each, 5 is two; then end and padding, to the end of CLIP's."""
    training = AlignTask(CONFIG, toys.WORDS, data, widths=[1, 1, 1, 1, 1, 2, 1, 1])
    places = training._places(torch.tensor([[3, 5, 4, 1, 0, 0, 0]]))
    assert places.tolist() == [[1, 3, 4, 5, 6, 6, 6]]
