"""A few-step LoRA of any flow MODEL that ComfyUI loads: stage 1 or stage 2 on `host.training`.

    lora, losses = distil(model, positive, negative, latents, Plan(sigmas=(1, 0.9, 0.75, 0.5, 0)))

The losses are the miniature's. Where there are no pictures, stage 2's heads learn from what the
teacher draws, as in SD3.5-Flash (arXiv 2509.21318), whose data are synthetic.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..host.learned import Progress, kept_if_stopped, lora_model
from ..host.training import Adapters, training
from .loop import TrainingDiverged
from .match import MatchConfig, MatchTask
from .optimize import adam_of, moments
from .several import ONE, One
from .student import StudentConfig, StudentTask
from .trajectory import TrajectoryConfig, TrajectoryTask

log = logging.getLogger(__name__)

METHODS = ("trajectory", "matching")
DTYPES = {"model": None, "bf16": torch.bfloat16, "fp32": torch.float32}
PREVIEWS = 16  # drawn in a training
MARK = 10  # steps between weights that are kept, should the training diverge


@dataclass(frozen=True)
class Plan:
    """What is learned, and how."""

    sigmas: tuple[float, ...]  # that the student will draw with, from 1 to 0
    method: str = "trajectory"  # stage 1; "matching" is stage 2
    steps: int = 400  # updates
    rank: int = 16  # of the LoRA; 0 learns whole weights, of all linear layers
    rate: float = 1e-4  # of AdamW, on the plateau
    guidance: float = 1.0  # the teacher's CFG
    batch: int = 1
    teacher_steps: int = 24  # along the whole trajectory
    trajectories: int = 32  # batches of the teacher's paths; then they are seen again
    recompute: bool = True  # gradient checkpointing
    seed: int = 0
    optimizer: str = "adamw"  # one of ADAMS; the others are bitsandbytes'
    dtype: str = "model"  # of activations: the MODEL's own, or one of DTYPES
    ema: float = TrajectoryConfig.ema
    clip: float = TrajectoryConfig.clip
    chords: tuple[float, ...] = TrajectoryConfig.chords  # of stage 1 alone
    # Of stage 2 alone: see MatchConfig.
    renoise: str = MatchConfig.renoise
    last_sigma: float = MatchConfig.last_sigma
    random_shift: float = MatchConfig.random_shift
    proxy_warmup: int | None = None  # None: a quarter of the steps, MatchConfig's at most
    proxy_steps: int = MatchConfig.proxy_steps
    proxy_rate: float | None = None  # None: twice `rate`, since the proxy has to follow
    ida: float = MatchConfig.ida
    adversarial: float = MatchConfig.adversarial
    head_rate: float = MatchConfig.head_rate
    restart: float = MatchConfig.restart
    branch: tuple[float, float] = MatchConfig.branch

    def __post_init__(self):
        """Raises: ValueError for a method, type or optimizer that there is not."""
        adam_of(self.optimizer)
        for name, known in (("method", METHODS), ("dtype", DTYPES)):
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {given!r}: expected one of {', '.join(known)}")

    def training(self, processes: One = ONE) -> dict:
        """What `host.training.training` is told."""
        return {
            "rank": self.rank,
            "batch": self.batch // processes.count,
            "recompute": self.recompute,
            "each": self.bytes_each(),
            "dtype": DTYPES[self.dtype],
            "mesh": processes.mesh,
        }

    def bytes_each(self) -> int:
        """That a learned number takes: it, its gradient and the optimizer's, of the student and of
        the proxy; and the student's average."""
        networks = 2 if self.method == "matching" else 1
        return 4 + networks * (8 + moments(self.optimizer))

    def _stage(self, kind: type, **others) -> StudentConfig:
        """A stage's configuration: the settings that it shares with the plan, and `others`. What
        is left out concerns the miniature's text encoders."""
        alike = {field.name for field in fields(kind)} & {field.name for field in fields(self)}
        others |= {"muon_rate": 0.0, "adam_rate": self.rate}
        others["warmup"] = max(1, min(20, self.steps // 10))
        return kind(**{name: getattr(self, name) for name in alike} | others)

    def trajectory(self) -> TrajectoryConfig:
        return self._stage(TrajectoryConfig, batches=self.trajectories)

    def match(self) -> MatchConfig:
        warmup, rate = self.proxy_warmup, self.proxy_rate
        usual = min(MatchConfig.proxy_warmup, self.steps // 4)
        return self._stage(
            MatchConfig,
            proxy_warmup=usual if warmup is None else warmup,
            proxy_rate=2 * self.rate if rate is None else rate,
        )


class Pictures:
    """Latents (m, channels, …) in the model's space and their prompts' numbers, in batches."""

    def __init__(self, latents: Tensor, prompts: int, batch: int, seed: int):
        """Raises: ValueError unless there are as many prompts as latents, or one of either."""
        count = max(len(latents), prompts)
        if {len(latents), prompts} - {1, count}:
            raise ValueError(
                f"{len(latents)} latents and {prompts} prompts: give as many of both, or one of "
                "either"
            )
        self.latents, self.prompts, self.count = latents, prompts, count
        self.batch, self.seed = batch, seed

    def __call__(self, index: int) -> tuple[Tensor, list[int]]:
        draw = torch.Generator().manual_seed((self.seed + 1) * 4_000_037 + index)
        chosen = torch.randint(self.count, (self.batch,), generator=draw)
        return self.latents[chosen % len(self.latents)], (chosen % self.prompts).tolist()


def build(
    plan: Plan,
    backbone: Adapters,
    latents: Tensor,
    folder: Path,
    start: dict[str, Tensor] | None = None,
    processes: One = ONE,
    origin: dict[str, Any] | None = None,
) -> StudentTask:
    """The task of a plan; the teacher's trajectories are kept in `folder`.

    latents: (m, channels, …) in the model's space; all zero, they only say the size. `origin`: see
    TrajectoryTask.
    Raises: ValueError where guidance needs a negative prompt, a batch cannot be shared out, or the
    optimizer is not there.
    """
    if plan.batch % processes.count:
        raise ValueError(
            f"batch is {plan.batch}, which {processes.count} processes cannot share: take a "
            "multiple of them"
        )
    if plan.guidance != 1 and backbone.negative is None:
        raise ValueError(
            f"guidance {plan.guidance:g} needs a negative prompt: connect one (it may be empty), "
            "or set guidance to 1."
        )
    adam = adam_of(plan.optimizer)
    data = Pictures(latents, len(backbone.positive), plan.batch, plan.seed)
    given = (backbone, data, start, adam, processes)
    if plan.method == "trajectory":
        return TrajectoryTask(plan.trajectory(), *given, folder=folder, origin=origin)
    if not latents.any():
        small = replace(plan, rank=1).trajectory()  # of this one only the teacher is wanted
        shown = (backbone, data, None, adam, processes)
        teacher = TrajectoryTask(small, *shown, folder=folder, origin=origin)
        given = (backbone, teacher.drawn, start, adam, processes)
    return MatchTask(plan.match(), *given)


@dataclass
class Learned:
    """What a training has come to: steps done, and the weights after so many of them, as a file has
    them.

    A finite loss proves the weights that it was computed with, so what is kept of a training that
    diverges is what stood before the last step that was proved.
    """

    task: StudentTask
    losses: list[float] = field(default_factory=list)
    diverged: bool = False
    proved: tuple[int, dict[str, Tensor]] = (0, {})
    marked: tuple[int, dict[str, Tensor]] | None = None

    def steps(self, count: int) -> Iterator[int]:
        """Of `count` updates, how many are done. Raises: TrainingDiverged."""
        for index in range(count):
            loss = self.task.step(index, index / count).item()
            if not math.isfinite(loss):
                self.diverged = True
                raise TrainingDiverged(self._told(loss, index, count))
            if self.marked is not None:
                self.proved, self.marked = self.marked, None
            self.losses.append(loss)
            if (index + 1) % MARK == 0:
                self.marked = index + 1, lora_model(self.task.weights())
            yield index + 1

    def _told(self, loss: float, index: int, count: int) -> str:
        what = f"The loss is {loss} at step {index} of {count}"
        if index == 0:
            return f"{what}, the first: see whether the model draws as it should"
        done = self.proved[0]
        kept = f"What was learned in {done} steps is kept" if done else "Nothing is kept"
        return f"{what}. {kept}; lower the learning rate."

    def kept(self) -> tuple[int, dict[str, Tensor]]:
        """Steps and weights that are worth keeping."""
        return self.proved if self.diverged else (len(self.losses), self.task.weights())


def distil(
    model, positive, negative, latents: Tensor, plan: Plan, start: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """Train, with the host's progress -> the LoRA in float32, and the loss of each update.

    positive, negative: CONDITIONING. latents: (m, channels, …) as the host's nodes pass them.
    Raises: ValueError; the host's interrupt, TrainingDiverged: both leave the LoRA so far in a
    file that the log names.
    """
    shape = tuple(latents.shape[1:])
    opened = training(model, positive, negative, shape, **plan.training())
    with opened as backbone, TemporaryDirectory() as folder:
        if latents.any():
            latents = backbone.model.process_latent_in(latents)
        task = build(plan, backbone, latents.clone(), Path(folder), start)
        progress = Progress(backbone.patcher, plan.steps)
        every = -(-plan.steps // PREVIEWS)
        learned = Learned(task)
        with kept_if_stopped(learned.kept):
            for done in learned.steps(plan.steps):
                shown = progress.previewer is not None and done % every == 0
                progress(done, task.draw() if shown else None)
        return task.weights(), learned.losses
