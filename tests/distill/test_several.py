"""Several processes learn what one does."""

import json
import os
import subprocess
import sys

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
        # halves of a batch are summed in another order
        assert two == pytest.approx(one, rel=1e-5)
        weights = [row["weights"] for row in rows if row["method"] == method]
        assert weights == pytest.approx([weights[0]] * 4, rel=1e-4)
    (whole,) = {row["kept"] for row in rows if row["processes"] == 1}
    parts = {row["kept"] for row in rows if row["processes"] == 2}
    assert max(parts) <= (0.51 if sharded else 1) * whole


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
