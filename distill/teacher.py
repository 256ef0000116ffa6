"""The teacher: rectified flow matching of an SD3-shaped MMDiT and its CLIP-L, trained end to end.

    x = (1 − sigma)·x0 + sigma·noise,    loss = ‖model(x, sigma, text) − (noise − x0)‖²

What is this trainer's own, for two CPU cores as well as a GPU: hidden matrices learn by Muon, the
rest by AdamW; the 61 tokens of padding that follow a short prompt are cut off in most steps (a
causal text model does not notice; the MMDiT learns to ignore how many there are, and sees all 77
now and then, and in every step towards the end).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..host import modules
from .dropout import drop_encoders
from .model import CLIP, START, T5, T5_END, FlowModel, ModelConfig, empty_prompt
from .optimize import HIDDEN, autocast, average, build_optimizers, restore, set_rates, update, warm

Batch = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """Sizes of the model and how it learns; rates are those at the plateau."""

    batch: int = 64
    muon_rate: float = 2e-3  # scaled to AdamW's size of update
    adam_rate: float = 1e-3
    decay: float = 0.02  # weight decay of the hidden matrices
    warmup: int = 100  # steps
    plateau: float = 0.5  # share of the budget before the rates fall linearly to zero
    ema: float = 0.998
    clip: float = 1.0  # norm of the gradient
    shift: float = 5.0  # of the logit-normal noise levels (SD3, arXiv 2403.03206, 3.1)
    empty_prompt: float = 0.1  # share of captions dropped, for guidance
    drop_clip: float = 0.0  # share of prompts whose CLIP-L is zeroed
    drop_t5: float = 0.0  # share of prompts whose T5 is zeroed, independently of CLIP-L
    omit_t5: float = 0.0  # share of batches that leave T5's tokens out
    unknown_token: float = (
        0.02  # share of tokens replaced by zero, so that unknown words do no harm
    )
    short_context: int = 16  # tokens kept in most steps
    full_every: int = 32  # steps
    full_from: float = 0.97  # share of the budget after which every step sees all 77 tokens
    learn: str | tuple[str, ...] = ""  # how the names of what learns begin: "t5."; "" for all
    compiled: bool = False  # torch.compile the blocks: a fifth faster, needs a C++ compiler
    seed: int = 0


def t5_alone(config: TeacherConfig) -> TeacherConfig:
    """`config`, by which the T5 alone learns, from whole prompts. Raises: ValueError for one that
    says otherwise.
    """
    if not config.t5_pieces:
        raise ValueError("the model has no T5 that could learn: set t5_pieces")
    if config.learn not in ("", "t5."):
        raise ValueError(f"learn is {config.learn!r}, but here the T5 alone learns: leave it out")
    for share in ("drop_clip", "drop_t5", "omit_t5"):
        if getattr(config, share):
            raise ValueError(f"{share} is not 0, but here the T5 learns from whole prompts")
    return replace(config, learn="t5.")


class TeacherTask:
    """Flow matching as a task for `distill.loop.train`.

    `data(index)` gives batch number `index`: latents (n, 16, h, w) and prompts (n, encoders, 77).
    """

    name = "teacher"

    def __init__(self, config: TeacherConfig, vocabulary: Sequence[int], data: Batch, device="cpu"):
        self.config, self.data, self.device = config, data, torch.device(device)
        self.batch, self.metrics = config.batch, {}
        torch.manual_seed(config.seed)
        self.model = FlowModel(config, vocabulary).to(self.device)
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(config.learn))
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(f"learn is {config.learn!r}: no weight's name begins so")
        hidden = (*HIDDEN, "context_embedder") if config.t5_pieces else HIDDEN
        self.optimizers = build_optimizers(self.model, config, hidden)
        if config.compiled:
            compile_blocks(self.model)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Go on from a model's averaged weights; a T5 that they lack keeps its first ones."""
        try:
            lacking, _ = self.model.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise ValueError("the model to start from has other sizes than this one's") from error
        if wrong := [name for name in lacking if not name.startswith("t5.")]:
            raise ValueError(f"the model to start from lacks {wrong[0]}: it is of another kind")
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}

    def _start_as(self, teacher: FlowModel) -> None:
        """Keep a frozen teacher, and start from its weights."""
        self.teacher = teacher.to(self.device).eval().requires_grad_(False)
        self.model.load_state_dict(self.teacher.state_dict())
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        if self.config.compiled:
            compile_blocks(self.teacher)

    def step(self, index: int, progress: float) -> Tensor:
        config = self.config
        rate = min((index + 1) / config.warmup, 1.0, (1 - progress) / (1 - config.plateau))
        set_rates(self.optimizers, rate)
        loss = self._loss(index, progress)
        self.metrics["gradient"] = update(loss, self.optimizers, config.clip)
        if loss.isfinite():
            average(self.ema, self.model.state_dict(), warm(config.ema, index))
        return loss.detach()

    def _loss(self, index: int, progress: float) -> Tensor:
        config, draw = self.config, torch.Generator()
        draw.manual_seed(config.seed * 1_000_003 + index)
        latents, tokens, noise, sigma = self._batch(index, draw)
        known = torch.rand(tokens.shape, generator=draw) >= config.unknown_token
        known[:, CLIP] |= tokens[:, CLIP] >= START
        known[:, T5:] |= tokens[:, T5:] <= T5_END
        tokens, known = (self._shortened(each, index, progress) for each in (tokens, known))
        x = torch.lerp(latents, noise, sigma[:, None, None, None])
        x, sigma, tokens, known = (t.to(self.device) for t in (x, sigma, tokens, known))
        with autocast(self.device):
            made = self.model(x, sigma, tokens, known).float()
            target = self._target((noise - latents).to(self.device), x, sigma, tokens, known)
        return nn.functional.mse_loss(made, target)

    def _shortened(self, tokens: Tensor, index: int, progress: float) -> Tensor:
        """What a step sees of prompts (…, 77): in most steps their beginning."""
        config = self.config
        short = progress < config.full_from and index % config.full_every
        return tokens[..., : config.short_context] if short else tokens

    def _batch(self, index: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, token ids, noise like the latents, and noise levels (n,)."""
        latents, tokens = self.data(index)
        empty = torch.rand(len(tokens), 1, 1, generator=draw) < self.config.empty_prompt
        tokens = torch.where(empty, empty_prompt(tokens), tokens)
        noise = torch.randn(latents.shape, generator=draw)
        sigma = self._sigma(len(latents), draw)
        return latents, drop_encoders(tokens, self.config, draw), noise, sigma

    def _sigma(self, number: int, draw: torch.Generator) -> Tensor:
        shift, time = self.config.shift, torch.sigmoid(torch.randn(number, generator=draw))
        return shift * time / (1 + (shift - 1) * time)

    def _target(
        self, velocity: Tensor, x: Tensor, sigma: Tensor, tokens: Tensor, known: Tensor
    ) -> Tensor:
        """What the model learns to say at (x, sigma): here the velocity of the sample itself."""
        return velocity

    def drawn(self) -> FlowModel:
        """The averaged model, for drawing."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.ema)
        return model.eval().requires_grad_(False)

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for name, value in state["ema"].items():
            self.ema[name].copy_(value)
        restore(self.optimizers, state["optimizers"])


def compile_blocks(model: FlowModel) -> None:
    """Compile an MMDiT's blocks and the T5, for each length of prompt anew."""
    torch._dynamo.config.recompile_limit = 64  # shared by all blocks of all models
    for block in model.mmdit.joint_blocks:
        block.compile(dynamic=False)
    model.encode_t5 = torch.compile(modules.encode_t5, dynamic=False)
