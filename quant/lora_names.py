"""Which weight of a model a LoRA file means: files name layers in half a dozen ways.

The model's own names, with dots or (kohya) with underscores, and diffusers' names of the same
layers, where one weight of ours may hold several of theirs in its rows. Prefixes say which program
wrote the file, and nothing else.
Source: the names in diffusers' checkpoints and those that ComfyUI's loader takes
(`comfy/lora.py` `model_lora_keys_unet`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .stored import StoredTensor

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.",
            "unet.", "lora_unet_", "lora_transformer_", "lycoris_", "lora_prior_unet_")  # fmt: skip
TEXT_ENCODERS = ("lora_te", "text_encoder", "text_encoders.", "lora_prior_te", "conditioner.")


@dataclass(frozen=True)
class Target:
    """Rows `first` … `last` of the matrix `weight` (of its first dimension)."""

    weight: str
    first: int
    last: int


def _whole(rows: int, _cols: int) -> tuple[int, ...]:
    return (rows,)


def _qkv(rows: int, cols: int) -> tuple[int, ...]:
    """Queries as wide as the model; keys and values share the rest."""
    return cols, (rows - cols) // 2, (rows - cols) // 2


def _six(rows: int, cols: int) -> tuple[int, ...]:
    """Shifts, scales and gates of two parts; the last context block has only a shift and a scale,
    which diffusers stores the other way round, and is not taken."""
    return (rows,) if rows == 6 * cols else ()


def _flux_linear1(rows: int, cols: int) -> tuple[int, ...]:
    """Queries, keys and values as wide as the model, and the first half of the feed-forward."""
    return cols, cols, cols, rows - 3 * cols


def _rows(ours: str, *theirs: str, split=None):
    """A line of a table: our layer's name, and what its rows are called in turn. # in ours and {}
    in theirs: the block's number."""
    split = split or (_whole if len(theirs) == 1 else _qkv)
    return re.compile(r"(\d+)".join(map(re.escape, ours.split("#")))), theirs, split


_TO_QKV = ("to_q", "to_k", "to_v")
_ADD_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _each(stem: str, names: tuple[str, ...]) -> list[str]:
    return [f"{stem}.{name}" for name in names]


_SD3 = (
    _rows("joint_blocks.#.x_block.attn.qkv", *_each("transformer_blocks.{}.attn", _TO_QKV)),
    _rows("joint_blocks.#.x_block.attn.proj", "transformer_blocks.{}.attn.to_out.0"),
    _rows("joint_blocks.#.x_block.attn2.qkv", *_each("transformer_blocks.{}.attn2", _TO_QKV)),
    _rows("joint_blocks.#.x_block.attn2.proj", "transformer_blocks.{}.attn2.to_out.0"),
    _rows("joint_blocks.#.x_block.mlp.fc1", "transformer_blocks.{}.ff.net.0.proj"),
    _rows("joint_blocks.#.x_block.mlp.fc2", "transformer_blocks.{}.ff.net.2"),
    _rows("joint_blocks.#.x_block.adaLN_modulation.1", "transformer_blocks.{}.norm1.linear"),
    _rows("joint_blocks.#.context_block.attn.qkv", *_each("transformer_blocks.{}.attn", _ADD_QKV)),
    _rows("joint_blocks.#.context_block.attn.proj", "transformer_blocks.{}.attn.to_add_out"),
    _rows("joint_blocks.#.context_block.mlp.fc1", "transformer_blocks.{}.ff_context.net.0.proj"),
    _rows("joint_blocks.#.context_block.mlp.fc2", "transformer_blocks.{}.ff_context.net.2"),
    _rows("joint_blocks.#.context_block.adaLN_modulation.1",
          "transformer_blocks.{}.norm1_context.linear", split=_six),
    _rows("x_embedder.proj", "pos_embed.proj"),
    _rows("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    _rows("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    _rows("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    _rows("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    _rows("final_layer.linear", "proj_out"),
)  # fmt: skip

_FLUX = (
    _rows("double_blocks.#.img_attn.qkv", *_each("transformer_blocks.{}.attn", _TO_QKV)),
    _rows("double_blocks.#.img_attn.proj", "transformer_blocks.{}.attn.to_out.0"),
    _rows("double_blocks.#.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
    _rows("double_blocks.#.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
    _rows("double_blocks.#.img_mlp.0", "transformer_blocks.{}.ff.linear_in"),
    _rows("double_blocks.#.img_mlp.2", "transformer_blocks.{}.ff.linear_out"),
    _rows("double_blocks.#.img_mod.lin", "transformer_blocks.{}.norm1.linear"),
    _rows("double_blocks.#.txt_attn.qkv", *_each("transformer_blocks.{}.attn", _ADD_QKV)),
    _rows("double_blocks.#.txt_attn.proj", "transformer_blocks.{}.attn.to_add_out"),
    _rows("double_blocks.#.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
    _rows("double_blocks.#.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
    _rows("double_blocks.#.txt_mlp.0", "transformer_blocks.{}.ff_context.linear_in"),
    _rows("double_blocks.#.txt_mlp.2", "transformer_blocks.{}.ff_context.linear_out"),
    _rows("double_blocks.#.txt_mod.lin", "transformer_blocks.{}.norm1_context.linear"),
    _rows("single_blocks.#.linear1", *_each("single_transformer_blocks.{}.attn", _TO_QKV),
          "single_transformer_blocks.{}.proj_mlp", split=_flux_linear1),
    _rows("single_blocks.#.linear1", "single_transformer_blocks.{}.attn.to_qkv_mlp_proj"),
    _rows("single_blocks.#.linear2", "single_transformer_blocks.{}.attn.to_out"),
    _rows("single_blocks.#.linear2", "single_transformer_blocks.{}.proj_out"),
    _rows("single_blocks.#.modulation.lin", "single_transformer_blocks.{}.norm.linear"),
    _rows("img_in", "x_embedder"),
    _rows("txt_in", "context_embedder"),
    _rows("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    _rows("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    _rows("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    _rows("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    _rows("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    _rows("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    _rows("final_layer.linear", "proj_out"),
)  # fmt: skip

_LUMINA2 = tuple(
    line
    for block in ("layers", "context_refiner", "noise_refiner")
    for line in (
        _rows(f"{block}.#.attention.qkv", *_each(f"{block}.{{}}.attention", _TO_QKV)),
        _rows(f"{block}.#.attention.out", f"{block}.{{}}.attention.to_out.0"),
    )
)

# The U-Net's residual blocks: ours -> diffusers'; its attention blocks keep their names.
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET = (
    _rows("time_embed.0", "time_embedding.linear_1"),
    _rows("time_embed.2", "time_embedding.linear_2"),
    _rows("label_emb.0.0", "add_embedding.linear_1"),
    _rows("label_emb.0.2", "add_embedding.linear_2"),
    _rows("input_blocks.0.0", "conv_in"),
    _rows("out.2", "conv_out"),
)
_UNET_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d+)\.(.+)")

# architecture's tag -> its table
TABLES = {"sd3": _SD3, "flux": _FLUX, "lumina2": _LUMINA2, "sdxl": _UNET, "sd1": _UNET}


def layer_of(key: str) -> str:
    """A layer's name in a LoRA file, without the prefixes that programs put before it."""
    shorter = next((key.removeprefix(p) for p in PREFIXES if key.startswith(p)), key)
    return key if shorter == key else layer_of(shorter)


def find(layer: str, known: Mapping[str, Target]) -> Target | None:
    """What a layer of a LoRA file means; `known`: see `targets`."""
    name = flat(layer_of(layer).replace(".processor.", "."))  # old diffusers: attn1.processor.to_q
    return known.get(name) or known.get(f"{name}_0")  # and to_out for to_out.0


def flat(name: str) -> str:
    """A name as kohya writes it, in which dots and underscores are the same."""
    return name.replace(".", "_").lstrip("_")


def targets(tensors: Mapping[str, StoredTensor], architecture: str) -> dict[str, Target]:
    """Each layer's names, `flat`, and what they mean; `tensors`: a model's, without prefix."""
    found: dict[str, Target] = {}
    for name, tensor in tensors.items():
        layer, dot, kind = name.rpartition(".")
        if not dot or kind != "weight" or not tensor.shape:
            continue
        found[flat(layer)] = Target(name, 0, tensor.shape[0])
        for alias, first, last in _aliases(layer, tensor, architecture):
            found.setdefault(flat(alias), Target(name, first, last))
    return found


def _aliases(layer: str, tensor: StoredTensor, architecture: str):
    """(diffusers' name, first row, last row) of each layer that this weight holds."""
    for pattern, theirs, split in TABLES.get(architecture, ()):
        if (match := pattern.fullmatch(layer)) is None:
            continue
        first = 0
        for alias, rows in zip(theirs, split(tensor.shape[0], tensor.cols), strict=False):
            yield alias.format(*match.groups()), first, first + rows
            first += rows
    if TABLES.get(architecture) is _UNET and (alias := _unet_alias(layer)) is not None:
        yield alias, 0, tensor.shape[0]


def _unet_alias(layer: str) -> str | None:
    """diffusers' name of a layer in a block of SD 1, 2 or XL, which have two layers a level."""
    if (match := _UNET_BLOCK.fullmatch(layer)) is None:
        return None
    side, number, part, rest = match[1], int(match[2] or 0), int(match[3]), match[4]
    inner = _RESNET.get(rest, rest)
    if side is None:
        kind = "attentions.0" if part == 1 else f"resnets.{part // 2}"
        return f"mid_block.{kind}.{inner}"
    level, place = divmod(number - 1 if side == "input" else number, 3)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest == "op":
        return f"{block}.downsamplers.0.conv"
    if rest == "conv":
        return f"{block}.upsamplers.0.conv"
    return f"{block}.{'attentions' if part == 1 else 'resnets'}.{place}.{inner}"
