"""The training loop: budgets, exact resuming, whole checkpoints, and a named end for NaN."""

import math

import pytest
import torch
from fewstep.distill.loop import (
    Budget,
    Done,
    TrainingDiverged,
    load_checkpoint,
    save_atomically,
    train,
)


class Slope:
    """One weight that learns a noisy 3; `breaks` makes the loss of that step NaN, and `cliffs` the
    gradients from that step on.
    """

    name, batch = "slope", 2

    def __init__(self, breaks=None, cliffs=None):
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
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
    assert second.seen == whole.seen[7:]
    assert torch.equal(second.weight, whole.weight)
    assert (done.steps, done.samples) == (20, 40)


@pytest.mark.parametrize("save_seconds", [0, 1000])
def test_names_the_step_of_a_nan_and_keeps_the_last_good_state(tmp_path, save_seconds):
    path = tmp_path / "slope.pt"
    with pytest.raises(TrainingDiverged, match=r"slope: loss nan at step 5.*slope\.pt"):
        train(Slope(breaks=5), path, Budget(samples=40), save_seconds, {"rate": 1.0})
    train(Slope(), path, Budget(samples=12), config={"rate": 0.5})  # as the message has it
    train(broken := Slope(breaks=6), path, Budget(samples=12), config={"rate": 0.5})
    assert broken.seen == []
    state = load_checkpoint(path)
    assert state["done"]["steps"] == 6
    assert torch.isfinite(state["task"]["weight"]).all()


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


@pytest.mark.parametrize("given", [{}, {"minutes": 1.0, "samples": 2}])
def test_a_budget_is_one_of_two(given):
    with pytest.raises(ValueError, match="minutes or samples"):
        Budget(**given)


def test_progress_is_the_share_used_up():
    done = Done(steps=5, samples=30, seconds=90)
    assert Budget(minutes=3).progress(done) == 0.5
    assert Budget(samples=60).progress(done) == 0.5
    assert Budget(samples=10).progress(done) == 1
