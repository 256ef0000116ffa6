"""Captions as the token ids of both text encoders: CLIP-L's, and a T5's with a vocabulary of words.

The T5 knows the words of the grammar and no others. Its pieces are those of a SentencePiece unigram
model, so that the GGUF file can carry them as llama.cpp's converter writes T5's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distill.model import T5_END, T5_PAD, T5_UNKNOWN
from ..host import modules
from .captions import VOCABULARY

PIECES = ("<pad>", "</s>", "<unk>", *(f"▁{word}" for word in sorted(VOCABULARY)))
_IDS = {piece[1:]: number for number, piece in enumerate(PIECES) if number > T5_UNKNOWN}


def tokenize_t5(text: str) -> list[int]:
    """77 ids of a prompt of plain words: words, end, padding."""
    ids = [_IDS.get(word, T5_UNKNOWN) for word in text.split()][: modules.TOKENS - 1]
    return [*ids, T5_END] + [T5_PAD] * (modules.TOKENS - 1 - len(ids))


def tokenize(texts: Sequence[str], encoders: int = 1) -> Tensor:
    """Prompts (n, encoders, 77) for `distill.model.FlowModel`: CLIP-L's ids, and T5's if 2."""
    rows = [modules.tokenize, tokenize_t5][:encoders]
    return torch.tensor([[row(text) for row in rows] for text in texts])
