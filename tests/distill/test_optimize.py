"""Optimizers by name: torch's, and a library's where it is installed."""

import sys
from types import ModuleType

import pytest
import torch
from fewstep.distill import optimize
from fewstep.distill.few_step_lora import Plan, build


def test_torchs_is_there_always():
    assert optimize.adam_of("adamw") is torch.optim.AdamW


@pytest.mark.parametrize("name", optimize.EIGHT_BIT)
def test_the_library_is_named_where_it_is_missing(monkeypatch, tmp_path, name):
    monkeypatch.setattr(optimize.importlib.util, "find_spec", lambda name: None)

    class Backbone:
        negative = None

    with pytest.raises(ValueError, match=rf"{name} needs the package bitsandbytes: pip install"):
        build(Plan((1, 0), optimizer=name), Backbone(), torch.zeros(1), tmp_path)


def test_the_librarys_own_class_is_taken(monkeypatch):
    package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optim.PagedAdamW8bit = object()
    monkeypatch.setattr(optimize.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    assert optimize.adam_of("paged_adamw8bit") is optim.PagedAdamW8bit


def test_an_unknown_name_is_answered_with_those_known():
    with pytest.raises(ValueError, match="expected one of adamw, adamw8bit, paged_adamw8bit"):
        optimize.adam_of("lion")


def test_the_library_itself_learns():
    """Where it is installed: its optimizers take our arguments, and go down."""
    pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.ones(64, 64))
    adam = optimize.adam_of("adamw8bit")
    groups = [{"params": [weight], "peak": 1e-2}]
    optimizer = adam(groups, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(5):
        optimize.update(weight.square().sum(), [optimizer], 1.0)
    assert weight.mean() < 1
