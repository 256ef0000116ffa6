"""A T5 as wide as T5-XXL but cut short: fewer layers, heads or pieces than the published one.

ComfyUI tells T5-XXL from other T5s by the shape of its last block, which a cut one lacks, and gives
it the published vocabulary. All that differs can be read off the file: sizes from shapes, and the
vocabulary from the GGUF file's metadata.
"""

import torch
from comfy.model_base import SD3
from comfy.sd1_clip import SDTokenizer
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer

WIDTH = 4096  # of T5-XXL, which SD3 and FLUX ask for
PIECES = 32128  # of the published vocabulary
POOLED = 768 + 1280  # of SD3's CLIP-L and CLIP-G
# The tensor that `comfy.sd.detect_te_model` looks at, and the number of its rows.
LAST_BLOCK, ROWS = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight", 10240
_FIRST = "encoder.block.0.layer."
_QUERY = _FIRST + "0.SelfAttention.q.weight"
_BIAS = _FIRST + "0.SelfAttention.relative_attention_bias.weight"
_UP = _FIRST + "1.DenseReluDense.wi_1.weight"


def is_cut(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether this is a T5 v1.1 encoder of T5-XXL's width that the host would not know for one."""
    known = LAST_BLOCK in state_dict and len(state_dict[LAST_BLOCK]) == ROWS
    query = state_dict.get(_QUERY)
    return not known and _UP in state_dict and query is not None and query.shape[1] == WIDTH


def sizes(path: str, state_dict: dict[str, torch.Tensor]) -> dict[str, int]:
    """What `t5_config_xxl.json` says of T5-XXL, for this encoder.

    Raises: ValueError naming a tensor that is missing, or heads that do not divide.
    """
    for name in (_BIAS, "shared.weight"):
        if name not in state_dict:
            raise ValueError(f"{path}: tensor {name} is missing. Get a whole T5 encoder.")
    inner, heads = len(state_dict[_QUERY]), state_dict[_BIAS].shape[1]
    if inner % heads:
        raise ValueError(
            f"{path}: {_QUERY} has {inner} rows, which {heads} heads do not divide. The file was "
            "badly converted: get another one."
        )
    blocks = {name.split(".")[2] for name in state_dict if name.startswith("encoder.block.")}
    return {
        "num_layers": len(blocks),
        "num_heads": heads,
        "d_kv": inner // heads,
        "d_ff": len(state_dict[_UP]),
        "vocab_size": len(state_dict["shared.weight"]),
    }


def mark(path: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Let the host take a cut T5 for a T5-XXL: an empty tensor stands in for the last block's.

    Raises: ValueError for a vocabulary that is neither the published one nor in the file.
    """
    pieces = len(state_dict["shared.weight"])
    if pieces != PIECES and "spiece_model" not in state_dict:
        raise ValueError(
            f"{path}: the T5 has a vocabulary of its own ({pieces} pieces, not {PIECES}), but the "
            "file holds no tokenizer.ggml.* to read it with. Get a file converted by llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    state_dict[LAST_BLOCK] = torch.empty(ROWS, 0)


def use_vocabulary(clip, state_dict: dict[str, torch.Tensor]) -> None:
    """Have a loaded CLIP's T5 read by its own vocabulary, where its file brings one."""
    proto = state_dict.get("spiece_model")
    if proto is None or len(state_dict["shared.weight"]) == PIECES:
        return
    published = clip.tokenizer.t5xxl
    clip.tokenizer.t5xxl = SDTokenizer(
        proto,
        embedding_directory=published.embedding_directory,
        embedding_size=WIDTH,
        embedding_key="t5xxl",
        tokenizer_class=SPieceTokenizer,
        has_start_token=False,
        pad_with_end=False,
        pad_to_max_length=False,
        max_length=published.max_length,
        min_length=published.min_length,
    )


def take_alone(model) -> None:
    """Let an SD3 (a BaseModel) whose CLIP is narrower than SD3's draw by a T5 alone too: where CLIP
    is missing, the host takes zeros for its pooled vectors, but as wide as SD3's.
    """
    width = model.adm_channels
    if not isinstance(model, SD3) or width == POOLED:
        return

    def encode_adm(**given):
        pooled = given["pooled_output"]
        missing = pooled.shape[-1] == POOLED and not pooled.any()
        return pooled.new_zeros(len(pooled), width) if missing else pooled

    model.encode_adm = encode_adm
