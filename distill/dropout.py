"""Encoder dropout: a model that sees some prompts without an encoder can later do without it.

SD3's pre-training zeroes each encoder on its own (arXiv 2403.03206, B.3); ComfyUI leaves T5's
tokens out where no T5 is loaded. Both are learned here. The shares of SD3.5-Flash are not
published; ours favour T5's absence, which is what its users want.
"""

from typing import Protocol

import torch
from torch import Tensor

from .model import ABSENT, T5, empty_prompt


class Shares(Protocol):
    """The fields of a trainer's configuration that say what is dropped how often."""

    drop_clip: float  # share of prompts whose CLIP-L is zeroed
    drop_t5: float  # share of prompts whose T5 is zeroed, independently of CLIP-L
    omit_t5: float  # share of batches that leave T5's tokens out


def drop_encoders(tokens: Tensor, shares: Shares, draw: torch.Generator) -> Tensor:
    """Prompts (n, encoders, t) of which some do without an encoder.

    T5's tokens are left out of a whole batch at once, since all its prompts are of one length; then
    and in prompts for CLIP-L alone nothing else is dropped.
    """
    if tokens.shape[1] == 1:
        return tokens
    if torch.rand((), generator=draw) < shares.omit_t5:
        return tokens[:, :T5]
    share = torch.tensor([shares.drop_clip, shares.drop_t5])[:, None]
    absent = torch.rand(len(tokens), 2, 1, generator=draw) < share
    return tokens.masked_fill(absent, ABSENT)


def emptied(tokens: Tensor) -> Tensor:
    """The empty prompt in place of each prompt (n, encoders, t), with the same encoders absent."""
    return torch.where(tokens < 0, tokens, empty_prompt(tokens))
