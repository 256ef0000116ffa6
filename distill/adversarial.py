"""Adversarial heads on a network's features: several small judges of one noisy latent.

Each head reads what one block of the proxy makes of the picture's tokens. Of two networks that play
a game the judge must not win for good, so a head starts anew now and then.
Source: SD3.5-Flash, arXiv 2509.21318 (heads on the proxy's features, re-initialised with p = 0.005
a step); its loss is not published: ours is the logistic one of Goodfellow et al. 2014, whose
generator maximises log D.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


@contextmanager
def tapped(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that each of an MMDiT's `blocks`, called inside, adds its picture tokens to.

    (n, tokens, width) each, in float32.
    """
    features: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: features.append(out[1].float()))
        for block in blocks
    ]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


class Heads(nn.Module):
    """One head for each of `count` tapped blocks: features (n, tokens, width) to logits (n,)."""

    def __init__(self, count: int, width: int, draw: torch.Generator, hidden: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1)
            )
            for _ in range(count)
        )
        for head in self.heads:
            self._initialise(head, draw)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (count, n), the mean over a sample's tokens: above 0 where it looks real.

        Of a network that was called for several parts of a batch, all blocks' features of one call
        come before those of the next.
        """
        count = len(self.heads)
        parts = [features[i::count] for i in range(count)]
        pairs = zip(self.heads, parts, strict=True)
        return torch.stack(
            [torch.cat([head(part).mean((1, 2)) for part in own]) for head, own in pairs]
        )

    def restart(
        self, chance: float, draw: torch.Generator, optimizer: torch.optim.Optimizer
    ) -> list[int]:
        """Each head with this chance starts anew, and the optimizer forgets it; which ones did."""
        chosen = [i for i in range(len(self.heads)) if torch.rand((), generator=draw) < chance]
        for i in chosen:
            self._initialise(self.heads[i], draw)
            for parameter in self.heads[i].parameters():
                optimizer.state.pop(parameter, None)
        return chosen

    @torch.no_grad()
    def _initialise(self, head: nn.Module, draw: torch.Generator) -> None:
        """Matrices by fan-in, the norm's weight 1, biases 0."""
        for name, parameter in head.named_parameters():
            if parameter.ndim == 2:
                fresh = torch.randn(parameter.shape, generator=draw)
                parameter.copy_(fresh * parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def judge_loss(real: Tensor, made: Tensor) -> Tensor:
    """What the heads minimise, of their logits for real latents and for the student's."""
    return softplus(-real).mean() + softplus(made).mean()


def student_loss(made: Tensor) -> Tensor:
    """What the student minimises, of the heads' logits for its latents."""
    return softplus(-made).mean()
