"""A toy teacher with a T5, prompts and latents by number, and students of it."""

from dataclasses import replace
from functools import cache

import torch
from fewstep.distill.backbone import Copies
from fewstep.distill.match import MatchConfig, MatchTask
from fewstep.distill.model import FlowModel, ModelConfig
from fewstep.distill.trajectory import TrajectoryConfig, TrajectoryTask

TOY = ModelConfig(depth=1, text_width=32, text_heads=2, t5_pieces=8)
WORDS = range(320, 340)  # CLIP ids
SHAPE = (16, 8, 8)


@cache
def _teacher():
    torch.manual_seed(0)
    model = FlowModel(TOY, WORDS).eval().requires_grad_(False)
    for parameter in model.mmdit.parameters():
        if not parameter.any():  # zero-initialised layers are filled, so that everything matters
            parameter.normal_(std=0.05)
    model.text.table[1:].normal_()
    return model


def teacher():
    """A fresh copy, so that no test sees another's."""
    model = FlowModel(TOY, WORDS).eval().requires_grad_(False)
    model.load_state_dict(_teacher().state_dict())
    return model


def data(index, batch=4):
    """Latents (batch, 16, 8, 8) and prompts (batch, 2, 77)."""
    draw = torch.Generator().manual_seed(index)
    clip = torch.full((batch, 77), 49407)
    clip[:, 0], clip[:, 1:4] = 49406, torch.randint(320, 340, (batch, 3), generator=draw)
    t5 = torch.zeros(batch, 77, dtype=torch.long)
    t5[:, :3], t5[:, 3] = torch.randint(3, 8, (batch, 3), generator=draw), 1
    return torch.randn(batch, *SHAPE, generator=draw), torch.stack([clip, t5], 1)


MATCH = MatchConfig(batch=4, warmup=2, proxy_steps=1, proxy_warmup=0, adam_rate=1e-4)
TRAJECTORY = TrajectoryConfig(batch=4, warmup=2, teacher_steps=8, batches=3)


def match(start=None, **changes):
    return MatchTask(replace(MATCH, **changes), Copies(teacher()), data, start)


def trajectory(folder, knowing=None, **changes):
    config = replace(TRAJECTORY, **changes)
    return TrajectoryTask(config, Copies(teacher()), data, folder=folder, mend=knowing)
