"""The model that is trained here: an SD3-shaped MMDiT, its CLIP-L and, in T5's place, a small T5.

A prompt is a tensor of token ids (n, encoders, tokens): row 0 is CLIP-L's, row 1 T5's. A row of
ABSENT stands for an encoder that this prompt does without: its context and pooled vector are zero,
as in SD3's pre-training (arXiv 2403.03206, B.3). Prompts without row 1 leave T5's tokens out of the
context altogether, as ComfyUI does where no T5 is loaded; those whose rows 0 are all LEFT_OUT leave
CLIP-L's out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..host import modules

START, END = 49406, 49407  # CLIP's special tokens; END is the padding too
UNKNOWN = 0  # the row of CLIP's token table that stays zero
T5_PAD, T5_END, T5_UNKNOWN = 0, 1, 2
ABSENT = -1  # every token of an encoder that a prompt does without
LEFT_OUT = -2  # every token of CLIP-L in prompts for T5 alone
CLIP, T5 = 0, 1  # rows of a prompt


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; the hidden width of the MMDiT is 64·depth."""

    depth: int = 4  # blocks and heads
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    t5_pieces: int = 0  # in T5's vocabulary; 0 for a model without T5
    t5_layers: int = 1
    t5_heads: int = 2
    t5_head_width: int = 32
    t5_feed_forward: int = 64

    @property
    def encoders(self) -> int:
        """Rows of a prompt."""
        return 2 if self.t5_pieces else 1


class PromptEncoder(nn.Module):
    """CLIP-L in small, with a token table that holds only the ids in use."""

    def __init__(self, config: ModelConfig, vocabulary: Sequence[int]):
        super().__init__()
        ids = sorted({START, END, *vocabulary})
        self.register_buffer("ids", torch.tensor(ids))
        self.register_buffer("rows", torch.zeros(END + 1, dtype=torch.long), persistent=False)
        self.rows[self.ids] = torch.arange(1, len(ids) + 1)
        self.table = nn.Parameter(0.02 * torch.randn(len(ids) + 1, config.text_width))
        self.table.data[UNKNOWN] = 0
        self.clip = modules.build_text_model(
            config.text_width, config.text_layers, config.text_heads
        )

    def forward(self, tokens: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Context (n, t, width) and pooled (n, width) of CLIP ids (n, t); `known` masks words."""
        rows = self.rows[tokens] if known is None else self.rows[tokens] * known
        embeds = nn.functional.embedding(rows, self.table, padding_idx=UNKNOWN)
        return modules.encode_text(self.clip, embeds, (tokens == END).int().argmax(1))


class FlowModel(nn.Module):
    """Text encoders and MMDiT together: (x, sigma, tokens) to velocity."""

    encode_t5 = staticmethod(modules.encode_t5)

    def __init__(self, config: ModelConfig, vocabulary: Sequence[int]):
        super().__init__()
        self.config = config
        self.text = PromptEncoder(config, vocabulary)
        self.mmdit = modules.build_mmdit(config.depth, config.text_width)
        if config.t5_pieces:
            self.t5 = modules.build_t5(
                config.t5_pieces,
                config.t5_layers,
                config.t5_heads,
                config.t5_head_width,
                config.t5_feed_forward,
            )

    def encode(self, tokens: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Context and pooled (n, width) of prompts (n, encoders, t); `known` masks words.

        Context is (n, t, width) of CLIP-L alone, (n, t, 4096) of T5 alone, (n, 2t, 4096) of both.
        """
        ids = tokens.clamp(min=0)  # what stands for these matters not, it is zeroed below
        present = (tokens[:, :, :1] >= 0).float()
        masks = [None] * tokens.shape[1] if known is None else known.unbind(1)
        context, pooled = self.text(ids[:, CLIP], masks[CLIP])
        context, pooled = context * present[:, CLIP, :, None], pooled * present[:, CLIP]
        if tokens.shape[1] == 1:
            return context, pooled
        told = ids[:, T5] if known is None else torch.where(masks[T5], ids[:, T5], T5_UNKNOWN)
        other = self.encode_t5(self.t5, told) * present[:, T5, :, None]
        if (tokens[:, CLIP] == LEFT_OUT).all():
            return other, pooled
        context = nn.functional.pad(context, (0, other.shape[-1] - context.shape[-1]))
        return torch.cat([context, other], 1), pooled

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor, known=None) -> Tensor:
        return modules.velocity(self.mmdit, x, sigma, *self.encode(tokens, known))


def empty_prompt(tokens: Tensor) -> Tensor:
    """Token ids of the empty prompt, as many, as long and for as many encoders as `tokens`."""
    blank = torch.full_like(tokens, END)
    blank[:, CLIP, 0] = START
    if tokens.shape[1] > 1:
        blank[:, T5] = T5_PAD
        blank[:, T5, 0] = T5_END
    return blank
