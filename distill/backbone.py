"""What a student is made of: one network in three roles, and how it is asked.

The losses (`trajectory`, `match`) know a teacher, a student and a proxy, what the networks are
told, and their velocities; nothing else. `Copies` are three whole copies of the miniature's
network; `host.training.Adapters` is any MODEL that ComfyUI loads, whose weights all three share.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..host import modules
from .adversarial import tapped
from .dropout import drop_encoders, emptied
from .lora import add_lora, effective
from .model import FlowModel
from .optimize import HIDDEN, autocast

TEACHER = None  # the network that every backbone has already


class Told(Protocol):
    """The fields of a student's configuration that say what a network is told and how it learns."""

    rank: int
    seed: int
    drop_clip: float
    drop_t5: float
    omit_t5: float
    short_context: int
    full_every: int


class Backbone(Protocol):
    """`Text` below is whatever the backbone's own `velocity` takes, for a batch."""

    device: torch.device
    hidden: Sequence[str]  # parts of names whose matrices may learn by Muon

    def student(self, config: Told, start: dict[str, Tensor] | None) -> nn.Module:
        """A network that starts as the teacher, or from `weights` of before; its parameters that
        require a gradient are what is learned."""

    def proxy(self, config: Told) -> nn.Module:
        """Another network that starts as the teacher and learns."""

    def read(self, prompts: Any, config: Told, draw: torch.Generator) -> tuple:
        """The `Text` of a step's prompts, and that of no prompts in their place."""

    def join(self, first: Any, second: Any) -> Any:
        """The `Text` of both batches, one after the other."""

    def velocity(
        self, network: nn.Module | None, x: Tensor, sigma: Tensor, text: Any, frozen: bool = False
    ) -> Tensor:
        """A network's velocity, as x, in float32; sigma (n,). `frozen`: its weights get no gradient
        of this call, x may."""

    def tapped(self, network: nn.Module) -> AbstractContextManager[list[Tensor]]:
        """A list that every block, whenever it is called inside, adds its features (n, tokens,
        width) to."""

    def features(self) -> tuple[int, int]:
        """How many features `tapped` gives for one call, and their width."""

    def follow(self, proxy: nn.Module, student: nn.Module, share: float) -> None:
        """Move the proxy's weights by this share of the way to the student's."""

    def weights(self, student: nn.Module) -> dict[str, Tensor]:
        """What is to be kept of a student, by name."""


class Text(NamedTuple):
    """What an MMDiT is told: context (n, tokens, width) and pooled (n, width)."""

    context: Tensor
    pooled: Tensor


class Copies:
    """A FlowModel's MMDiT as teacher, and copies of it; the text encoders stay the teacher's.

    Prompts are token ids (n, encoders, 77). A student learns all its weights, or a LoRA of them.
    """

    hidden = (*HIDDEN, "context_embedder")

    def __init__(self, teacher: FlowModel, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.teacher = teacher.to(self.device).eval().requires_grad_(False)

    def student(self, config: Told, start: dict[str, Tensor] | None) -> nn.Module:
        student = copy.deepcopy(self.teacher.mmdit)
        if start is not None:
            student.load_state_dict(start)
        if config.rank:
            torch.manual_seed(config.seed)
            return add_lora(student, config.rank)
        return student.requires_grad_(True)

    def proxy(self, config: Told) -> nn.Module:
        return copy.deepcopy(self.teacher.mmdit).requires_grad_(True)

    def read(self, prompts: Tensor, config: Told, draw: torch.Generator) -> tuple[Text, Text]:
        tokens = drop_encoders(prompts, config, draw)
        if torch.randint(config.full_every, (), generator=draw):
            tokens = tokens[..., : config.short_context]
        return self._encode(tokens), self._encode(emptied(tokens))

    @torch.no_grad()
    def _encode(self, tokens: Tensor) -> Text:
        with autocast(self.device):
            return Text(*self.teacher.encode(tokens.to(self.device)))

    def join(self, first: Text, second: Text) -> Text:
        return Text(*(torch.cat(pair) for pair in zip(first, second, strict=True)))

    def velocity(
        self,
        network: nn.Module | None,
        x: Tensor,
        sigma: Tensor,
        text: Text,
        frozen: bool = False,
    ) -> Tensor:
        network = self.teacher.mmdit if network is TEACHER else network
        if frozen:
            network.requires_grad_(False)
        with autocast(self.device):
            made = modules.velocity(network, x, sigma, *text).float()
        if frozen:
            network.requires_grad_(True)
        return made

    def tapped(self, network: nn.Module) -> AbstractContextManager[list[Tensor]]:
        return tapped(network.joint_blocks)

    def features(self) -> tuple[int, int]:
        network = self.teacher.mmdit
        return len(network.joint_blocks), network.final_layer.linear.in_features

    @torch.no_grad()
    def follow(self, proxy: nn.Module, student: nn.Module, share: float) -> None:
        for name, value in proxy.named_parameters():
            value.lerp_(effective(student, name), share)

    @torch.no_grad()
    def weights(self, student: nn.Module) -> dict[str, Tensor]:
        """All weights of the MMDiT, a LoRA's added to those that it changes."""
        names = self.teacher.mmdit.state_dict()
        return {name: effective(student, name).detach().clone() for name in names}

    def drawn(self, weights: dict[str, Tensor]) -> FlowModel:
        """A student's weights with the teacher's encoders, for drawing."""
        model = copy.deepcopy(self.teacher)
        model.mmdit.load_state_dict(weights)
        return model
