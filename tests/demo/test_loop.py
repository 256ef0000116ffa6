"""The training loop: budgets, exact resuming, whole checkpoints, and a named end for NaN."""

import io
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fewstep import run
from fewstep.distill.loop import (
    Budget,
    Done,
    TrainingDiverged,
    alone,
    load_checkpoint,
    save_atomically,
    train,
)


class Slope:
    """One weight that learns a noisy 3; `breaks` makes the loss of that step NaN, and `cliffs` the
    gradients from that step on.
    """

    name, batch = "slope", 2

    def __init__(self, breaks=None, cliffs=None, far=1.0):
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.far = far
        self.breaks, self.cliffs, self.seen, self.metrics = breaks, cliffs, [], {}

    def step(self, index, progress):
        self.seen.append((index, progress))
        target = 3 + torch.randn(1, generator=torch.Generator().manual_seed(index))
        loss = (self.weight - target).square().mean() * (math.nan if index == self.breaks else 1)
        if index == self.breaks:
            return loss.detach()
        if self.cliffs is not None and index >= self.cliffs:
            self.metrics["gradient"] = torch.tensor(math.inf)
            return loss.detach()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = 0.1 * (1 - progress)
        self.optimizer.step()
        self.weight.data.mul_(self.far)
        return loss.detach()

    def state_dict(self):
        return {"weight": self.weight.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.weight.data.copy_(state["weight"])
        self.optimizer.load_state_dict(state["optimizer"])


def test_goes_on_to_the_very_same_weights(tmp_path):
    whole, first, second = Slope(), Slope(breaks=7), Slope()
    train(whole, tmp_path / "whole.pt", Budget(samples=40), save_seconds=0)
    with pytest.raises(TrainingDiverged):
        train(first, tmp_path / "cut.pt", Budget(samples=40), save_seconds=0)
    done = train(second, tmp_path / "cut.pt", Budget(samples=40), save_seconds=0)
    assert second.seen == whole.seen[6:]  # the state before step 7 has not proved good
    assert torch.equal(second.weight, whole.weight)
    assert (done.steps, done.samples) == (20, 40)


@pytest.fixture
def interruptible():
    """Whatever the tests run in: a shell's background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Pressed(Slope):
    """Ctrl-C is pressed in each of these steps."""

    def __init__(self, *presses, **options):
        super().__init__(**options)
        self.presses = presses

    def step(self, index, progress):
        if index in self.presses:
            signal.raise_signal(signal.SIGINT)
        return super().step(index, progress)


def test_ctrl_c_ends_a_training_once_its_state_is_kept(tmp_path, interruptible):
    whole, first, second = Slope(), Pressed(4), Slope()
    train(whole, tmp_path / "whole.pt", Budget(samples=40))
    with pytest.raises(KeyboardInterrupt):
        train(first, tmp_path / "cut.pt", Budget(samples=40))
    assert len(first.seen) == 6  # the step after has proved it good
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    train(second, tmp_path / "cut.pt", Budget(samples=40))
    assert second.seen == whole.seen[5:] and torch.equal(second.weight, whole.weight)


def test_ctrl_c_again_ends_it_at_once(tmp_path, interruptible):
    task = Pressed(4, 5)
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "cut.pt", Budget(samples=40))
    assert len(task.seen) == 5
    assert load_checkpoint(tmp_path / "cut.pt")["done"]["steps"] == 5


def test_where_ctrl_c_is_ignored_a_training_goes_on(tmp_path, interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    done = train(Pressed(4, 5), tmp_path / "whole.pt", Budget(samples=40))
    assert done.steps == 20 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_state_that_the_step_after_finds_broken_is_not_kept_at_ctrl_c(tmp_path, interruptible):
    with pytest.raises(TrainingDiverged):
        train(Pressed(4, breaks=5), tmp_path / "cut.pt", Budget(samples=40))
    assert not (tmp_path / "cut.pt").exists()


def test_names_the_step_of_a_nan_and_keeps_the_last_good_state(tmp_path):
    path = tmp_path / "slope.pt"
    with pytest.raises(TrainingDiverged, match=r"slope: loss nan at step 5; .*slope\.pt"):
        train(Slope(breaks=5), path, Budget(samples=40), 0, {"rate": 1.0})
    assert load_checkpoint(path)["done"]["steps"] == 4
    train(Slope(), path, Budget(samples=12), config={"rate": 0.5})  # as the message has it
    train(broken := Slope(breaks=6), path, Budget(samples=12), config={"rate": 0.5})
    assert broken.seen == []
    state = load_checkpoint(path)
    assert state["done"]["steps"] == 6
    assert torch.isfinite(state["task"]["weight"]).all()
    assert [file.name for file in tmp_path.glob("[!.]*")] == ["slope.pt"]


def test_a_step_that_breaks_the_weights_is_not_kept(tmp_path):
    path = tmp_path / "slope.pt"
    train(Slope(), path, Budget(samples=8))
    wild = Slope(far=3e38)  # its step 4 is finite, but what it leaves is not
    with pytest.raises(TrainingDiverged, match=r"loss (nan|inf) at step 5; the last good state"):
        train(wild, path, Budget(samples=40), save_seconds=0)
    assert load_checkpoint(path)["done"]["steps"] == 4
    train(tame := Slope(), path, Budget(samples=40))
    assert tame.seen[0][0] == 4 and torch.isfinite(tame.weight).all()


def test_a_first_loss_that_is_no_number_is_not_blamed_on_the_rate(tmp_path):
    with pytest.raises(TrainingDiverged, match="look at what it starts from"):
        train(Slope(breaks=0), tmp_path / "slope.pt", Budget(samples=40), save_seconds=0)
    with pytest.raises(TrainingDiverged, match="before anything was saved"):
        train(Slope(breaks=2), tmp_path / "slope.pt", Budget(samples=40), save_seconds=1000)
    assert list(tmp_path.glob("[!.]*")) == []


def test_gradients_that_stay_infinite_are_named(tmp_path):
    task = Slope(cliffs=3)
    with pytest.raises(TrainingDiverged, match="gradient inf at step 27"):
        train(task, tmp_path / "slope.pt", Budget(samples=400))
    assert load_checkpoint(tmp_path / "slope.pt")["done"]["steps"] == 27


def test_a_finished_training_is_left_alone(tmp_path):
    train(Slope(), tmp_path / "slope.pt", Budget(samples=8))
    again = Slope()
    train(again, tmp_path / "slope.pt", Budget(samples=8))
    assert again.seen == [] and again.weight != 0


def test_minutes_end_a_training_at_full_progress(tmp_path):
    task = Slope()
    done = train(task, tmp_path / "slope.pt", Budget(minutes=0.5 / 60))
    assert 0.5 <= done.seconds < 5
    progress = [progress for _, progress in task.seen]
    assert progress == sorted(progress) and progress[0] == 0 and progress[-1] < 1


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "deep" / "state.pt"
    save_atomically({"a": torch.ones(3)}, path)
    with pytest.raises((AttributeError, TypeError)):
        save_atomically({"a": torch.zeros(3), "cannot be stored": (i for i in "x")}, path)
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "slope.pt"
    train(Slope(), path, Budget(samples=8))
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no checkpoint at all"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"slope\.pt is damaged.*delete it"):
            train(Slope(), path, Budget(samples=40))
    for other in ([1], {"config": {}}, {"task": {}, "done": {}}):
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"slope\.pt is no .*"):
            train(Slope(), path, Budget(samples=40))


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_disk_that_is_full_and_a_stop_while_saving_leave_the_file_before(
    tmp_path, monkeypatch, error
):
    path = tmp_path / "state.pt"
    save_atomically({"a": torch.ones(3)}, path)

    class Full(io.BufferedWriter):
        def write(self, data):
            raise error

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(io.FileIO(path, "w")))
    with pytest.raises(type(error)) as told:
        save_atomically({"a": torch.zeros(300_000)}, path)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert "state.pt cannot be written: No space left" in str(told.value)
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("name", ["minutes", "samples"])
@pytest.mark.parametrize("given", [0, -1, math.nan])
def test_a_budget_is_more_than_nothing(name, given):
    with pytest.raises(ValueError, match=f"{name} is {given}: give more than 0"):
        Budget(**{name: given})


@pytest.mark.parametrize("given", [{}, {"minutes": 1.0, "samples": 2}])
def test_a_budget_is_one_of_two(given):
    with pytest.raises(ValueError, match="minutes or samples"):
        Budget(**given)


def test_progress_is_the_share_used_up():
    done = Done(steps=5, samples=30, seconds=90)
    assert Budget(minutes=3).progress(done) == 0.5
    assert Budget(samples=60).progress(done) == 0.5
    assert Budget(samples=10).progress(done) == 1


def test_two_trainings_of_one_run_keep_out_of_each_others_way(tmp_path):
    path = tmp_path / "run.pt"
    with alone(path):
        kept = torch.zeros(1)
        save_atomically({"kept": kept}, path)
        with pytest.raises(ValueError, match=r"run\.pt is being trained by another process"):
            train(Slope(), path, Budget(samples=4))
        assert torch.equal(load_checkpoint(path)["kept"], kept)
    path.unlink()
    left = tmp_path / "run.pt.123.tmp"  # by one that was killed
    left.write_bytes(b"half")
    assert train(Slope(), path, Budget(samples=4)).steps == 2
    assert not left.exists()


def test_too_little_memory_does_not_make_a_file_damaged(tmp_path, monkeypatch):
    save_atomically({"weight": torch.zeros(3)}, tmp_path / "run.pt")

    def load(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError, match="too little memory to read it"):
        load_checkpoint(tmp_path / "run.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("saves", [1, 20])
def test_a_process_killed_at_any_moment_is_gone_on_from(tmp_path, saves):
    """In another process, whose every step is saved: killed in the midst of whatever it does."""
    whole, path = Slope(), tmp_path / "run.pt"
    train(whole, tmp_path / "whole.pt", Budget(samples=400), save_seconds=0)
    program = (
        "import pathlib, run, sys; run.load_pack(); from fewstep.tests.demo import test_loop as t; "
        "t.train(t.Slope(), pathlib.Path(sys.argv[1]), t.Budget(samples=400), 0)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=run.ROOT)
    seen = set()
    while len(seen) < saves:
        assert child.poll() is None
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 0 < load_checkpoint(path)["done"]["steps"] < 200
    train(again := Slope(), path, Budget(samples=400))
    assert torch.equal(again.weight, whole.weight)
    assert not list(tmp_path.glob("*.tmp"))
