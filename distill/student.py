"""What all students share: a network that learns to draw in a few euler steps.

What it is made of is a backbone's to say (see `backbone`). A step draws all its randomness from its
number (see `loop`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..flow import check_sigmas
from .backbone import TEACHER, Backbone
from .optimize import Adam, average, build_optimizers, restore, set_rates, update, warm
from .several import ONE, One

Batch = Callable[[int], tuple[Tensor, Any]]


@dataclass(frozen=True)
class StudentConfig:
    """How a student draws and learns. Rates are those at the plateau."""

    sigmas: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5, 0.0)  # uniform, shift 3, rounded
    guidance: float = 2.0  # scale of CFG that the student learns; the miniature draws best by it
    rank: int = 0  # of a LoRA on every linear layer; 0 trains all weights
    batch: int = 64
    muon_rate: float = 0.0  # of hidden matrices, scaled to AdamW's size of update; 0: AdamW for all
    adam_rate: float = 1e-4
    decay: float = 0.0  # weight decay of Muon: from a trained start there is little to hold back
    warmup: int = 20  # steps
    plateau: float = 0.5  # share of the budget before the rates fall linearly to zero
    ema: float = 0.99
    clip: float = 1.0  # norm of the gradient
    drop_clip: float = 0.0  # encoders dropped as in TeacherConfig
    drop_t5: float = 0.2
    omit_t5: float = 0.5
    short_context: int = 16  # tokens kept in most steps
    full_every: int = 16  # steps, on the mean, from one that keeps all 77 to the next
    seed: int = 0

    def __post_init__(self):
        """Raises: ValueError for sigmas that do not fall from 1 to 0."""
        if (row := check_sigmas(self.sigmas))[0] != 1 or row[-1] != 0:
            raise ValueError(f"sigmas are {self.sigmas}: a student starts at 1 and ends at 0")
        if self.decay and not self.muon_rate:
            raise ValueError(f"decay is {self.decay}, which is Muon's alone: set muon_rate as well")


class Sample(NamedTuple):
    """What a step learns from: latents and noise (n, channels, …), the prompts, the empty ones."""

    latents: Tensor
    noise: Tensor
    told: Any
    untold: Any


class StudentTask:
    """The part of a task for `distill.loop.train` that does not depend on the loss.

    `data(index)` gives latents (n, channels, …) and prompts, as the backbone reads them. A subclass
    has `_loss`, and `metrics` holds what else it has to say of its last step.
    """

    name = "student"
    waits = 0  # steps before the student itself begins to learn
    starts_far = True  # from where it goes: its average then begins as a mean of all there is

    def __init__(
        self,
        config: StudentConfig,
        backbone: Backbone,
        data: Batch,
        start: dict[str, Tensor] | None = None,
        adam: Adam = torch.optim.AdamW,
        processes: One = ONE,
    ):
        """`start`: weights that the student starts with, as `weights` gave them; None: the
        teacher's. `adam`: the optimizer of all that Muon leaves. `processes`: that train together.
        """
        self.config, self.backbone, self.data, self.adam = config, backbone, data, adam
        self.processes = processes
        self.device, self.batch, self.metrics = backbone.device, config.batch, {}
        self.sigmas = check_sigmas(config.sigmas)
        self.student = backbone.student(config, start)
        learned = {name for name, p in self.student.named_parameters() if p.requires_grad}
        state = self.student.state_dict()
        self.ema = {name: value.clone() for name, value in state.items() if name in learned}
        self.optimizers = build_optimizers(self.student, config, backbone.hidden, adam)
        self.learn = processes.averaging(self.student, self._loss)

    def step(self, index: int, progress: float) -> Tensor:
        """A loss that is not finite changes nothing."""
        config = self.config
        own = index - self.waits
        rate = min((own + 1) / config.warmup, 1.0, (1 - progress) / (1 - config.plateau))
        set_rates(self.optimizers, rate)
        draw = self._draw(index)
        loss = self.learn(index, self._sample(index, draw), draw)
        seen = self.processes.mean(loss.detach())
        if not seen.isfinite():
            return seen
        self.metrics["gradient"] = update(loss, self.optimizers, config.clip)
        decay = warm(config.ema, own) if self.starts_far else config.ema
        average(self.ema, self.student.state_dict(), decay)
        return seen

    def _draw(self, index: int) -> torch.Generator:
        """The randomness of one step."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + index)

    def _loss(self, index: int, sample: Sample, draw: torch.Generator) -> Tensor:
        raise NotImplementedError

    def _sample(self, index: int, draw: torch.Generator) -> Sample:
        latents, prompts = self.data(index)
        own = self.processes.own
        told, untold = self.backbone.read(own(prompts), self.config, draw)
        noise = own(torch.randn(latents.shape, generator=draw))
        latents = own(latents)
        return Sample(latents.to(self.device), noise.to(self.device), told, untold)

    def _noise_like(self, x: Tensor, draw: torch.Generator) -> Tensor:
        """This process's share of the noise of a whole batch."""
        whole = (len(x) * self.processes.count, *x.shape[1:])
        return self.processes.own(torch.randn(whole, generator=draw)).to(x)

    def _velocity(
        self, network: nn.Module | None, x: Tensor, sigma: Tensor, text: Any, frozen: bool = False
    ) -> Tensor:
        """A network's velocity in float32; sigma is () or, each sample at its own level, (n,)."""
        sigma = sigma.to(x).expand(len(x))
        return self.backbone.velocity(network, x, sigma, text, frozen)

    @torch.no_grad()
    def _guided(self, x: Tensor, sigma: Tensor, sample: Sample) -> Tensor:
        """The teacher's velocity with CFG."""
        if self.config.guidance == 1:
            return self._velocity(TEACHER, x, sigma, sample.told)
        both = self.backbone.join(sample.untold, sample.told)
        twice = sigma.expand(len(x)).repeat(2)
        untold, told = self._velocity(TEACHER, torch.cat([x, x]), twice, both).chunk(2)
        return torch.lerp(untold, told, self.config.guidance)

    @torch.no_grad()
    def _walk(self, sample: Sample, steps: int, network: nn.Module | None = None) -> Tensor:
        """The student's own state after so many of its steps; those of another `network`'s."""
        x, network = sample.noise, network or self.student
        for sigma, following in zip(self.sigmas[:steps], self.sigmas[1:], strict=False):
            x = x + (following - sigma) * self._velocity(network, x, sigma, sample.told)
        return x

    def draw(self) -> Tensor:
        """What the student, not averaged, makes of the first batch's noise: (batch, channels, …)"""
        return self._walk(self._sample(0, self._draw(0)), len(self.sigmas) - 1)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The averaged student, as its backbone keeps it."""
        self._swap()
        try:
            return self.backbone.weights(self.student)
        finally:
            self._swap()

    def _swap(self) -> None:
        """The student for its average, one tensor at a time."""
        state = self.student.state_dict()
        for name, value in self.ema.items():
            now = state[name].clone()
            state[name].copy_(value)
            value.copy_(now)

    def state_dict(self) -> dict:
        learned = {name: self.student.state_dict()[name] for name in self.ema}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {
            "student": learned,
            "ema": self.ema,
            "weights": self.weights(),
            "optimizers": optimizers,
        }

    def load_state_dict(self, state: dict) -> None:
        self.student.load_state_dict(state["student"], strict=False)
        for name, value in self.ema.items():
            value.copy_(state["ema"][name])
        restore(self.optimizers, state["optimizers"])


def per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """Noise levels (n,) shaped to multiply x (n, channels, …)."""
    return sigma.view(-1, *[1] * (x.ndim - 1))
