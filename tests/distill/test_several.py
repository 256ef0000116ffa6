"""Several processes learn what one does."""

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from fewstep import run
from fewstep.distill import several
from fewstep.distill.few_step_lora import Plan, build


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_have_the_losses_of_one(tmp_path, sharded):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "tests.distill.two_processes", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    done = subprocess.run(
        [sys.executable, *launch, *worker],
        cwd=run.ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(rows) == 8
    for method in ("trajectory", "matching"):
        made = {(row["processes"], tuple(row["losses"])) for row in rows if row["method"] == method}
        (one,) = {losses for count, losses in made if count == 1}
        (two,) = {losses for count, losses in made if count == 2}  # the same in both processes
        # halves of a batch are summed in another order, and states are kept in float16: where a sum
        # lies between two of its numbers, that order says which
        assert two == pytest.approx(one, rel=1e-4)
        weights = [row["weights"] for row in rows if row["method"] == method]
        assert weights == pytest.approx([weights[0]] * 4, rel=1e-4)
    (whole,) = {row["kept"] for row in rows if row["processes"] == 1}
    parts = {row["kept"] for row in rows if row["processes"] == 2}
    assert max(parts) <= (0.51 if sharded else 1) * whole


def test_what_a_plan_says_of_a_stage_is_what_the_stage_is_told():
    """Every setting that both have, but for those that the plan names otherwise."""
    own = {"batch", "sigmas", "guidance", "seed", "rank", "clip", "ema", "branch", "renoise"}
    given = {"ida": 0.9, "restart": 0.1, "last_sigma": 0.25, "random_shift": 2.0, "head_rate": 0.01}
    given |= {"proxy_warmup": 3, "proxy_steps": 4, "proxy_rate": 0.02, "adversarial": 0.5}
    given |= {"ema": 0.5, "clip": 2.0, "branch": (0.0, 0.5), "renoise": "levels", "seed": 7}
    plan = Plan((1.0, 0.5, 0.0), "matching", **given, batch=3, guidance=2.0, rank=4)
    config = plan.match()
    shared = {f.name for f in fields(plan)} & {f.name for f in fields(config)}
    assert shared == own | set(given)
    assert all(getattr(plan, name) == getattr(config, name) for name in shared)
    usual = Plan((1.0, 0.0), "matching", steps=40, rate=1e-3).match()
    assert (usual.proxy_warmup, usual.proxy_rate, usual.adam_rate) == (10, 2e-3, 1e-3)


class Three(several.One):
    count = 3


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    class Backbone:
        negative = None

    with pytest.raises(ValueError, match="batch is 4, which 3 processes cannot share"):
        build(Plan((1, 0), batch=4), Backbone(), torch.zeros(1), tmp_path, processes=Three())


def test_one_process_asks_for_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert several.processes(cpu=True) is several.ONE


def test_accelerate_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(several.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install accelerate"):
        several.processes(cpu=True)
