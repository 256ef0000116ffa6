"""Muon in float32, beside torch's in bfloat16."""

import copy

import pytest
import torch
from fewstep.distill import muon
from fewstep.distill.muon import Muon, orthogonal


def train(shape, monkeypatch, fast, begun=None, steps=4):
    """What Muon makes of a matrix, and its state afterwards."""
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda: fast)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Muon([{"params": [weight]}], lr=0.1, weight_decay=0.02)
    if begun:
        optimizer.load_state_dict(copy.deepcopy(begun))
    for step in range(steps):
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return weight.detach(), copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (48, 48)])
def test_updates_are_torchs_but_for_their_rounding(monkeypatch, shape):
    (ours, state), (theirs, known) = (train(shape, monkeypatch, fast) for fast in (False, True))
    assert 0 < (ours - theirs).norm() < 0.02 * theirs.norm()
    assert state["param_groups"] == known["param_groups"]
    (own,), (other,) = state["state"].values(), known["state"].values()
    assert own.keys() == other.keys() and torch.equal(
        own["momentum_buffer"], other["momentum_buffer"]
    )


def test_either_goes_on_from_the_others_state(monkeypatch):
    _, begun = train((24, 96), monkeypatch, fast=True)
    ours, _ = train((24, 96), monkeypatch, fast=False, begun=begun)
    theirs, _ = train((24, 96), monkeypatch, fast=True, begun=begun)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_singular_values_come_near_one():
    matrix = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7))
    assert values.min() > 0.5 and values.max() < 1.3
