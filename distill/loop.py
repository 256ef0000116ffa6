"""The training loop that every trainer here shares: budget, checkpoints, resuming, the log.

A task draws all its randomness from the number of the step, so that a checkpoint needs no state of
random generators: killed at any point and run again, it goes on to bit-identical weights (on one
machine, with a budget in samples; one in minutes depends on the machine's speed).
"""

import logging
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor

log = logging.getLogger(__name__)

LOG_STEPS = 25
FIRST = 5  # steps that are told one by one: the first of a large batch take minutes
LOST_GRADIENTS = 25  # in a row, that are not finite, before a training counts as diverged
# Settings that a training may go on with changed: its end, and its rates.
FREE = ("steps", "muon_rate", "adam_rate", "proxy_rate", "head_rate", "rate")


class Task(Protocol):
    """What the loop trains: `step` does one whole update; the state holds all that it changes."""

    name: str
    batch: int

    def step(self, index: int, progress: float) -> Tensor:
        """Update number `index` at `progress` in [0, 1] of the budget; the loss, detached. One that
        is not finite leaves the task as it was."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class TrainingDiverged(RuntimeError):
    """The loss, or its gradient, is no longer finite. The last good state is kept."""


@dataclass(frozen=True)
class Budget:
    """How long to train: minutes of wall clock (pauses not counted), or samples; just one."""

    minutes: float | None = None
    samples: int | None = None

    def __post_init__(self):
        if (self.minutes is None) == (self.samples is None):
            raise ValueError("a budget is either minutes or samples: give just one of the two")
        for name in ("minutes", "samples"):
            if (given := getattr(self, name)) is not None and not given > 0:
                raise ValueError(f"{name} is {given}: give more than 0")

    def progress(self, done: "Done") -> float:
        """The share used up, 1 when training is over."""
        if self.minutes is not None:
            return min(done.seconds / (60 * self.minutes), 1.0)
        return min(done.samples / self.samples, 1.0)


@dataclass
class Done:
    """How far a training has come."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint beside its place, then rename it there: never half a file."""
    os.replace(_save_beside(state, path), path)


def _save_beside(state: dict, path: Path) -> Path:
    """Raises: OSError naming `path` where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__  # torch's writer ends with an error of its own
        if isinstance(error, RuntimeError) and isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if isinstance(error, RuntimeError | OSError):
            raise OSError(f"{path} cannot be written: {cause or error}") from error
        raise
    return temporary


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """A checkpoint of ours; tensors and plain values only, nothing in it is executed.

    Raises: ValueError for a file that is none; OSError; MemoryError.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        if "allocate" in str(error):
            raise MemoryError(f"{path}: too little memory to read it") from error
        raise ValueError(f"{path} is damaged, or no file of ours: delete it") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no file of ours: it holds no dict. Delete it")
    return state


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nothing else trains into the checkpoint at `path` meanwhile; what a killed one has left of
    saving it is deleted. Raises: ValueError where something does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        with lock:
            for left in path.parent.glob(f"{path.name}.*.tmp"):
                left.unlink()
            yield
    except Timeout as error:
        raise ValueError(
            f"{path} is being trained by another process: wait for it, or give another --name"
        ) from error


def check_config(path: Path, made: dict, asked: dict, free: Sequence[str] = ()) -> None:
    """Raises: ValueError naming every setting in which a checkpoint's differs from what is asked,
    but for the `free` ones.

    Checkpoints of before settings were kept have none: `made` is then empty, and taken as it is.
    """
    keys = [key for key in {**made, **asked} if key not in free]
    odd = [key for key in keys if made and made.get(key) != asked.get(key)]
    if odd:
        parts = ", ".join(f"{key} {made.get(key)} (now {asked.get(key)})" for key in odd)
        raise ValueError(
            f"{path} was made with another configuration: {parts}. Train under another name, or "
            "delete the file to start anew."
        )


@contextmanager
def _interrupts() -> Iterator[list]:
    """A list that holds something once Ctrl-C was pressed; pressed again, it interrupts. In a
    thread, or one of several processes, which have to stop at the same step, it does at once; and
    where it is ignored, as in a shell's background, it stays so.
    """
    pressed, before = [], signal.getsignal(signal.SIGINT)
    single = int(os.environ.get("WORLD_SIZE", "1")) == 1
    main = threading.current_thread() is threading.main_thread()
    if not (single and main) or before in (None, signal.SIG_IGN):
        yield pressed
        return

    def note(*_) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)
        log.info("stopping after the next step, which the state is kept for; again: at once")

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    task: Task,
    path: Path,
    budget: Budget,
    save_seconds: float = 180.0,
    config: dict | None = None,
    watch: Callable[[Done, float], None] | None = None,
    writes: bool = True,
) -> Done:
    """Train until the budget is used up, going on from the checkpoint at `path` if there is one.

    `config`: plain values that a checkpoint must have been made with. `watch(done, loss)` is called
    after every LOG_STEPS steps, and the last one, with their mean loss. `writes`: False in all of
    several processes but one, which then neither save nor watch.
    A state is kept once the loss of the next step is finite: one that a step too large has broken
    never takes the place of the one before.
    Raises: TrainingDiverged, naming the step, as soon as a loss is not finite, or when gradients
    have not been for LOST_GRADIENTS steps; ValueError for a checkpoint of another configuration, or
    one that another process trains; KeyboardInterrupt after Ctrl-C, once the state is kept.
    """
    with alone(path) if writes else nullcontext(), _interrupts() as pressed:
        return _train(task, path, budget, save_seconds, config, watch, writes, pressed)


def _train(task, path, budget, save_seconds, config, watch, writes, pressed) -> Done:
    """See `train`."""
    done, config = Done(), config or {}
    if path.exists():
        state = load_checkpoint(path)
        check_config(path, state.get("config", {}), config, FREE)
        try:
            task.load_state_dict(state["task"])
            done = Done(**state["done"])
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is no checkpoint of this training: delete it") from error
        log.info("%s: going on at step %d from %s", task.name, done.steps, path)
    start, saved, losses, lost = time.monotonic() - done.seconds, done.seconds, [], 0
    began, written, stopping = done.steps, None, False

    def save() -> Path | None:
        if not writes:
            return None
        state = {"task": task.state_dict(), "done": asdict(done), "config": config}
        return _save_beside(state, path)

    def keep() -> None:
        nonlocal written
        if written is not None:
            os.replace(written, path)
            written = None

    try:
        while budget.progress(done) < 1:
            losses.append(task.step(done.steps, budget.progress(done)).float().cpu())
            if not math.isfinite(losses[-1]):
                if written is not None:
                    written.unlink()
                    written = None
                raise TrainingDiverged(_diverged(task, losses[-1], done.steps, began, path))
            keep()
            if stopping:
                raise KeyboardInterrupt
            gradient = float(getattr(task, "metrics", {}).get("gradient", 0.0))
            lost = 0 if math.isfinite(gradient) else lost + 1
            if lost == LOST_GRADIENTS:  # which changed nothing
                written = save()
                raise TrainingDiverged(
                    f"{task.name}: gradient {gradient} at step {done.steps}; the state before it "
                    f"is kept in {path}: run the same command with a lower learning rate, and it "
                    "goes on from there"
                )
            done.steps, done.samples = done.steps + 1, done.samples + task.batch
            done.seconds = time.monotonic() - start
            if done.steps - began <= FIRST:
                log.info("%s: step %d loss %.4f", task.name, done.steps, losses[-1])
            ended = budget.progress(done) >= 1
            if done.steps % LOG_STEPS == 0 or ended:
                mean = torch.stack(losses).mean().item()
                rate = done.samples / done.seconds
                log.info("%s: step %d loss %.4f %.1f/s", task.name, done.steps, mean, rate)
                losses.clear()
                if watch is not None and writes:
                    watch(done, mean)
            stopping = bool(pressed)
            if stopping or done.seconds - saved > save_seconds or ended:
                written, saved = save(), done.seconds
    finally:
        keep()
    told = "%s: %d samples in %d steps; %s is the checkpoint, to go on from"
    log.info(told, task.name, done.samples, done.steps, path)
    return done


def _diverged(task: Task, loss: Tensor, step: int, began: int, path: Path) -> str:
    """What is said of a loss that is not finite, in a training that began at step `began`."""
    what = f"{task.name}: loss {loss} at step {step}"
    if step == began:
        return f"{what}, the first: look at what it starts from, and what it learns from"
    if not path.exists():
        return f"{what}, before anything was saved: run the same command with a lower learning rate"
    return (
        f"{what}; the last good state is kept in {path}: run the same command with a lower "
        "learning rate, and it goes on from there"
    )
