"""Stage 1, trajectory guidance: one student step for many of the teacher's.

The teacher, with CFG, carries noise along its trajectory through the student's noise levels
s_0 = 1 > … > s_n = 0. From each x_i on it the student learns the straight way to the next one:

    loss = ‖v(x_i, s_i, text) − (x_{i+1} − x_i) / (s_{i+1} − s_i)‖²

Trajectories are made when first needed and kept on disk: they cost more than the learning does.
Those of four steps serve two as well.

Two settings, ours, change the way from noise to picture before it is learned. With `mend`, where
the true pictures are known by formula, it ends at the nearest right one, and each state moves
towards it by its share of picture: x_i + (1 − s_i)·(right − x_n). So the student does not learn the
teacher's faults. With `chords`, a few of the noise levels, it is straight from one of those to the
next, so that one student draws in as many steps as there are levels and in as many as there are
chords.
Source: SD3.5-Flash, arXiv 2509.21318 (regression onto the teacher's multi-step integrals; how many
of its steps make one, and that states are the teacher's own, are our choices).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..flow import check_sigmas
from .loop import check_config, load_checkpoint, save_atomically
from .student import Sample, StudentConfig, StudentTask, per_sample

# The settings on which a trajectory depends; other ones are refused where it is kept.
DECISIVE = (
    "sigmas",
    "guidance",
    "teacher_steps",
    "batch",
    "seed",
    "omit_t5",
    "drop_t5",
    "drop_clip",
)


@dataclass(frozen=True)
class TrajectoryConfig(StudentConfig):
    muon_rate: float = 1e-3
    adam_rate: float = 5e-4
    teacher_steps: int = 16  # along the whole trajectory, as many to each step of the student
    batches: int = 96  # of trajectories; then they are seen again, each time at another x_i
    states: str | None = None  # run whose trajectories are used, if they pass all `sigmas`
    mend: bool = False  # end at the nearest right picture; only where the data set knows it
    chords: tuple[float, ...] = ()  # levels between which the way is straight; none: the teacher's

    def __post_init__(self):
        """Raises: ValueError for chords that do not go from 1 to 0 along the student's levels."""
        super().__post_init__()
        if self.chords:
            row = check_sigmas(self.chords).tolist()
            if row[0] != 1 or row[-1] != 0 or not set(self.chords) <= set(self.sigmas):
                raise ValueError(
                    f"chords are {self.chords}: expected levels from 1 to 0 out of {self.sigmas}"
                )


class TrajectoryTask(StudentTask):
    """Stage 1 as a task for `distill.loop.train`; trajectories are kept in `folder`.

    `mend(number, latents)` gives the latents of the right pictures nearest to those that the
    teacher made of the prompts of batch `number`. `origin`: plain values that say which teacher
    and which prompts those are; trajectories of others are refused.
    """

    name = "trajectory"

    def __init__(
        self,
        config: TrajectoryConfig,
        *args,
        folder: Path,
        mend: Callable[[int, Tensor], Tensor] | None = None,
        origin: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(config, *args, **kwargs)
        if config.mend and mend is None:
            raise ValueError("mend is on, but nothing here knows what a right picture is")
        self.folder, self.mend, self.origin = folder, mend, origin or {}
        each = max(1, round(config.teacher_steps / (len(self.sigmas) - 1)))
        self.fine = [torch.linspace(a, b, 1 + each) for a, b in pairwise(self.sigmas.tolist())]

    def _sample(self, index: int, draw: torch.Generator) -> Sample:
        """Of the batch whose trajectories are used: with the prompts that they were made of."""
        number = index % self.config.batches
        again = torch.Generator().manual_seed((self.config.seed + 1) * 2_000_003 + number)
        return super()._sample(number, again)

    def drawn(self, index: int) -> tuple[Tensor, Any]:
        """A batch of what the teacher draws, (batch, channels, …), and its prompts: the ends of
        its trajectories, as data for another task.
        """
        number = index % self.config.batches
        own = self._trajectory(number, self._sample(number, torch.Generator()))[-1]
        return self.processes.whole(own).cpu(), self.data(number)[1]

    def _loss(self, index: int, sample: Sample, draw: torch.Generator) -> Tensor:
        states = self._trajectory(index % self.config.batches, sample)
        n = torch.arange(states.shape[1])
        whole = (len(n) * self.processes.count,)
        i = torch.randint(len(self.sigmas) - 1, whole, generator=draw)  # each sample its own
        i = self.processes.own(i)
        x, following = states[i, n], states[i + 1, n]
        length = per_sample((self.sigmas[i + 1] - self.sigmas[i]).to(x), x)
        made = self._velocity(self.student, x, self.sigmas[i], sample.told)
        return nn.functional.mse_loss(made, (following - x) / length)

    def _trajectory(self, number: int, sample: Sample) -> Tensor:
        """The states (n + 1, batch, channels, …) at the student's noise levels that it learns from:
        the teacher's, changed as the configuration has it."""
        share = f"-{self.processes.number}" if self.processes.count > 1 else ""
        path = self.folder / f"{number:05d}{share}.pt"
        made = {key: getattr(self.config, key) for key in DECISIVE} | self.origin
        if self.processes.count > 1:
            made["processes"] = self.processes.count
        kept = load_checkpoint(path) if self.processes.all(path.exists()) else None
        if kept is None:
            kept = {"states": self._walk_of_teacher(sample).half().cpu(), "made": made}
            if not kept["states"].isfinite().all():
                raise ValueError(
                    f"the teacher's trajectory {number} is not finite, and not kept: see whether "
                    "the model draws as it should, with this guidance and in this type"
                )
            save_atomically(kept, path)
        elif not kept["states"].isfinite().all():
            raise ValueError(f"{path} holds states that are not finite: delete it")
        passed, needed = kept["made"]["sigmas"], made["sigmas"]
        if set(needed) <= set(passed):
            made["sigmas"] = passed
        check_config(path, kept["made"], made)
        if self.config.mend and "right" not in kept:
            kept["right"] = self.mend(number, kept["states"][-1].float()).half()
            save_atomically(kept, path)
        states = kept["states"][[passed.index(sigma) for sigma in needed]].float()
        if self.config.mend:
            towards = kept["right"].float() - states[-1]
            states += (1 - per_sample(torch.tensor(needed), states)) * towards
        return _straightened(states, needed, self.config.chords).to(self.device)

    def _walk_of_teacher(self, sample: Sample) -> Tensor:
        """The teacher's own states (n + 1, batch, channels, …)."""
        x, states = sample.noise, [sample.noise]
        for fine in self.fine:
            for sigma, following in pairwise(fine):
                x = x + (following - sigma) * self._guided(x, sigma, sample)
            states.append(x)
        return torch.stack(states)


def _straightened(states: Tensor, sigmas: Sequence[float], chords: Sequence[float]) -> Tensor:
    """States (n + 1, …) at `sigmas`, those inside a chord moved onto it."""
    for upper, lower in pairwise(chords):
        first, last = sigmas.index(upper), sigmas.index(lower)
        for i in range(first + 1, last):
            share = (upper - sigmas[i]) / (upper - lower)
            states[i] = torch.lerp(states[first], states[last], share)
    return states
