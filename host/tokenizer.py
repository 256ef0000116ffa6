"""The tokenizer of a text model converted by llama.cpp, as the host wants it.

Where ComfyUI does not ship a model's vocabulary (umT5, Gemma) it reads a SentencePiece model from
the tensor `spiece_model` of the state dict. A GGUF file holds the same vocabulary as metadata, so
the model is put together again: SentencePiece's protobuf message, of which five fields matter.
"""

import struct
from collections.abc import Mapping

import numpy as np
import torch

# Field numbers and enums of sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # of ModelProto
PIECE, SCORE, TYPE = 1, 2, 3  # of SentencePiece
MODEL_TYPE, BYTE_FALLBACK = 3, 35  # of TrainerSpec
SPECIAL_IDS = {"unknown": 40, "bos": 41, "eos": 42, "padding": 43}  # of TrainerSpec
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPE = 2, 3, 4, 5  # of NormalizerSpec
MODEL_TYPES = {"t5": 1, "llama": 2}  # tokenizer.ggml.model -> unigram, BPE
VARINT, BYTES, FLOAT = 0, 2, 5  # wire types


def sentencepiece_model(metadata: Mapping) -> torch.Tensor | None:
    """A uint8 tensor that SentencePiece loads, or None if the file has no such vocabulary."""
    key = "tokenizer.ggml."
    kind = MODEL_TYPES.get(metadata.get(key + "model"))
    if kind is None or key + "scores" not in metadata:
        return None
    tokens, scores = metadata[key + "tokens"], metadata[key + "scores"]
    types = metadata.get(key + "token_type", [1] * len(tokens))
    pieces = b"".join(
        field(PIECES, field(PIECE, token) + field(SCORE, float(score)) + field(TYPE, int(type_)))
        for token, score, type_ in zip(tokens, scores, types, strict=True)
    )
    trainer = field(MODEL_TYPE, kind) + field(BYTE_FALLBACK, int(6 in types))
    for name, number in SPECIAL_IDS.items():
        trainer += field(number, metadata.get(f"{key}{name}_token_id", -1))
    charsmap = metadata.get(key + "precompiled_charsmap", ())
    normalizer = (
        field(CHARSMAP, bytes(np.asarray(charsmap, dtype=np.uint8)))
        + field(DUMMY_PREFIX, int(metadata.get(key + "add_space_prefix", True)))
        + field(EXTRA_SPACES, int(metadata.get(key + "remove_extra_whitespaces", False)))
        + field(ESCAPE, 1)
    )
    proto = pieces + field(TRAINER, trainer) + field(NORMALIZER, normalizer)
    return torch.frombuffer(bytearray(proto), dtype=torch.uint8)


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a protobuf message; its wire type follows from the value's."""
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return varint(number << 3 | BYTES) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | FLOAT) + struct.pack("<f", value)
    return varint(number << 3 | VARINT) + varint(value)


def varint(value: int) -> bytes:
    """Protobuf's variable-length integer; negative ones are taken modulo 2^64."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
