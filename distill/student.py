"""What all students share: a copy of the teacher's network that draws in a few euler steps.

The text encoders stay the teacher's. A student learns all its weights, or a LoRA of them; a step
draws all its randomness from its number (see `loop`).
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..flow import check_sigmas
from ..host import modules
from .dropout import drop_encoders, emptied
from .lora import add_lora, effective
from .model import FlowModel
from .optimize import HIDDEN, average, build_optimizers, set_rates, update, warm
from .teacher import Batch


@dataclass(frozen=True)
class StudentConfig:
    """How a student draws and learns. Rates are those at the plateau."""

    sigmas: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5, 0.0)  # uniform, shift 3, rounded
    guidance: float = 3.0  # the scale of CFG that the teacher draws with, and the student learns
    rank: int = 0  # of a LoRA on every linear layer; 0 trains all weights
    batch: int = 64
    muon_rate: float = 0.0  # of hidden matrices, scaled to AdamW's size of update; 0: AdamW for all
    adam_rate: float = 1e-4
    decay: float = 0.0
    warmup: int = 20  # steps
    plateau: float = 0.5  # share of the budget before the rates fall linearly to zero
    ema: float = 0.99
    clip: float = 1.0  # norm of the gradient
    drop_clip: float = 0.0  # encoders dropped as in TeacherConfig
    drop_t5: float = 0.2
    omit_t5: float = 0.5
    short_context: int = 16  # tokens kept in most steps
    full_every: int = 16  # steps
    seed: int = 0

    def __post_init__(self):
        """Raises: ValueError for sigmas that do not fall from 1 to 0."""
        if (row := check_sigmas(self.sigmas))[0] != 1 or row[-1] != 0:
            raise ValueError(f"sigmas are {self.sigmas}: a student starts at 1 and ends at 0")


class Text(NamedTuple):
    """What a network is told: context (n, tokens, width) and pooled (n, width)."""

    context: Tensor
    pooled: Tensor


class Sample(NamedTuple):
    """What a step learns from: latents and noise (n, 16, h, w), the prompts, the empty ones."""

    latents: Tensor
    noise: Tensor
    told: Text
    untold: Text


class StudentTask:
    """The part of a task for `distill.loop.train` that does not depend on the loss.

    `data(index)` gives latents (n, 16, h, w) and prompts (n, encoders, 77). A subclass has `_loss`,
    and `metrics` holds what else it has to say of its last step.
    """

    name = "student"
    starts_far = True  # from where it goes: its average then begins as a mean of all there is

    def __init__(
        self,
        config: StudentConfig,
        teacher: FlowModel,
        data: Batch,
        start: dict[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ):
        """`start`: weights of the MMDiT that the student starts with; None: the teacher's."""
        self.config, self.data, self.device = config, data, torch.device(device)
        self.batch, self.metrics = config.batch, {}
        self.sigmas = check_sigmas(config.sigmas)
        self.teacher = teacher.to(self.device).eval().requires_grad_(False)
        self.student = copy.deepcopy(self.teacher.mmdit)
        if start is not None:
            self.student.load_state_dict(start)
        if config.rank:
            torch.manual_seed(config.seed)
            add_lora(self.student, config.rank)
        else:
            self.student.requires_grad_(True)
        learned = {name for name, p in self.student.named_parameters() if p.requires_grad}
        state = self.student.state_dict()
        self.ema = {name: value.clone() for name, value in state.items() if name in learned}
        self.optimizers = build_optimizers(self.student, config, (*HIDDEN, "context_embedder"))

    def step(self, index: int, progress: float) -> Tensor:
        config = self.config
        rate = min((index + 1) / config.warmup, 1.0, (1 - progress) / (1 - config.plateau))
        set_rates(self.optimizers, rate)
        draw = self._draw(index)
        loss = self._loss(index, self._sample(index, draw), draw)
        self.metrics["gradient"] = update(loss, self.optimizers, config.clip)
        decay = warm(config.ema, index) if self.starts_far else config.ema
        average(self.ema, self.student.state_dict(), decay)
        return loss.detach()

    def _draw(self, index: int) -> torch.Generator:
        """The randomness of one step."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + index)

    def _loss(self, index: int, sample: Sample, draw: torch.Generator) -> Tensor:
        raise NotImplementedError

    def _sample(self, index: int, draw: torch.Generator) -> Sample:
        latents, tokens = self.data(index)
        tokens = drop_encoders(tokens, self.config, draw)
        if index % self.config.full_every:
            tokens = tokens[..., : self.config.short_context]
        noise = torch.randn(latents.shape, generator=draw)
        latents, noise = latents.to(self.device), noise.to(self.device)
        return Sample(latents, noise, self._encode(tokens), self._encode(emptied(tokens)))

    @torch.no_grad()
    def _encode(self, tokens: Tensor) -> Text:
        with self._autocast():
            return Text(*self.teacher.encode(tokens.to(self.device)))

    def _velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """A network's velocity in float32; sigma is () or, each sample at its own level, (n,)."""
        with self._autocast():
            return modules.velocity(network, x, sigma.to(x).expand(len(x)), *text).float()

    @torch.no_grad()
    def _guided(self, x: Tensor, sigma: Tensor, sample: Sample) -> Tensor:
        """The teacher's velocity with CFG."""
        both = Text(*(torch.cat(pair) for pair in zip(sample.untold, sample.told, strict=True)))
        twice = sigma.expand(len(x)).repeat(2)
        untold, told = self._velocity(self.teacher.mmdit, x.repeat(2, 1, 1, 1), twice, both).chunk(
            2
        )
        return torch.lerp(untold, told, self.config.guidance)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The averaged weights of the student's MMDiT, a LoRA's added to those that it changes."""
        now = {name: self.student.state_dict()[name].clone() for name in self.ema}
        self.student.load_state_dict(self.ema, strict=False)
        names = self.teacher.mmdit.state_dict()
        weights = {name: effective(self.student, name).detach().clone() for name in names}
        self.student.load_state_dict(now, strict=False)
        return weights

    def drawn(self) -> FlowModel:
        """The averaged student with the teacher's encoders, for drawing."""
        model = copy.deepcopy(self.teacher)
        model.mmdit.load_state_dict(self.weights())
        return model

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
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
