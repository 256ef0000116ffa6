"""Write a trained demo model as the GGUF files that ship, named as ComfyUI names tensors."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as QType
from torch import Tensor, nn

from ..distill.model import T5_END, T5_PAD, T5_UNKNOWN, FlowModel, ModelConfig
from ..flow import Preset, preset_to_metadata, uniform
from ..host import modules, names, vocabulary
from ..quant import quantize, write_gguf
from ..quant.convert import convert
from ..quant.plan import make_plan
from ..quant.recipes import recipe_named
from ..quant.sources import open_source
from .prompts import PIECES

NAME = "fewstep-demo"
FILES = {
    "mmdit": f"diffusion_models/{NAME}.gguf",
    "text": f"text_encoders/{NAME}-clip-l.gguf",
    "t5": f"text_encoders/{NAME}-t5.gguf",
    "vae": f"vae/{NAME}-vae.gguf",
}
SHIFT = 2.0  # of the sampling schedule; 1.5, 3 and 6 score within one picture in twenty of it
PRESET = Preset(
    name=NAME,
    label="FewStep demo",
    steps=8,
    rows=tuple(tuple(uniform(steps, SHIFT).tolist()) for steps in (2, 4, 8)),
    formula="uniform",
    shift=SHIFT,
    t5="omit",
    sure="H",
    source="this repository: python -m demo train",
)
RECIPE = "flash-8"
# Kept at 16 bits by every recipe, as they should be; in a model this small they weigh too much.
SMALLER = tuple(
    (glob, QType.Q8_0) for glob in ("?_embedder.mlp.?.weight", "context_embedder.weight")
)

Types = tuple[tuple[str, QType], ...]
Entry = tuple[str, Tensor | tuple[Tensor, QType, tuple[int, ...]]]


def _packed(name: str, weight: Tensor, qtype: QType = QType.Q8_0) -> Entry:
    """A weight in blocks along its rows, or along all of it where they are too short."""
    rows = weight.float() if weight.shape[-1] % 32 == 0 else weight.float().reshape(1, -1)
    return name, (quantize(rows, qtype), qtype, tuple(weight.shape))


def write_mmdit(
    mmdit: nn.Module, path: Path, metadata: dict, recipe: str = RECIPE, other: Types = ()
) -> None:
    """Write an MMDiT as one of quant's recipes has it, but for tensors of `other` types."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / path.name
        write_gguf(whole, "sd3", metadata, mmdit.state_dict().items())
        convert(make_plan(open_source(whole), recipe_named(recipe), other), path)


def _text_tensors(model: FlowModel) -> Iterator[Entry]:
    """CLIP-L's, of its token table only the words that were learned (`host.vocabulary`)."""
    for name, value in model.text.clip.state_dict().items():
        value = model.text.table[1:] if name == vocabulary.TABLE else value
        yield (name, value.float()) if value.ndim < 2 else _packed(name, value)


def _t5_tensors(t5: nn.Module) -> Iterator[Entry]:
    """Under llama.cpp's names, so that whatever reads a T5 encoder in GGUF reads this one. In four
    bits, as T5s mostly are: there are 25 MB for all that ships.
    """
    inner = {theirs: ours for ours, theirs in names.T5.items()}
    for name, value in t5.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("encoder.block."):
            block, part = stem.removeprefix("encoder.block.").split(".", 1)
            stem = f"enc.blk.{block}.{inner[part]}"
        else:
            stem = inner[stem]
        name = f"{stem}.{kind}"
        if value.ndim < 2 or value.shape[-1] % 32:
            yield name, value.float()
        else:
            yield _packed(name, value, QType.Q5_0 if value.shape[-1] % 256 else QType.Q4_K)


def t5_metadata(config: ModelConfig) -> dict:
    """The sizes and the vocabulary, under llama.cpp's keys for T5."""
    pieces = range(len(PIECES))
    types = [2 if piece == T5_UNKNOWN else 3 if piece < T5_UNKNOWN else 1 for piece in pieces]
    sizes = {
        "block_count": config.t5_layers,
        "embedding_length": modules.CONTEXT_WIDTH,
        "feed_forward_length": config.t5_feed_forward,
        "attention.head_count": config.t5_heads,
        "attention.key_length": config.t5_head_width,
        "attention.value_length": config.t5_head_width,
        "attention.relative_buckets_count": 32,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    tokenizer = {
        "model": "t5",
        "tokens": list(PIECES),
        "scores": [0.0 if kind > 1 else -1.0 for kind in types],
        "token_type": types,
        "padding_token_id": T5_PAD,
        "eos_token_id": T5_END,
        "unknown_token_id": T5_UNKNOWN,
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
    }
    return {f"t5encoder.{key}": value for key, value in sizes.items()} | {
        f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()
    }


def _vae_tensors(vae: nn.Module) -> Iterator[Entry]:
    for name, value in vae.state_dict().items():
        small = value.numel() % 32 or value.ndim < 2
        yield (name, value.float().reshape(-1)) if small else _packed(name, value)


@torch.no_grad()
def export(
    model: FlowModel,
    vae: nn.Module,
    config: ModelConfig,
    folder: Path,
    preset: Preset = PRESET,
    recipe: str = RECIPE,
    name: str = NAME,
) -> list[Path]:
    """Write the files below `folder`, each whole or not at all; their paths.

    They are as many as FILES, less T5's for a model without one. `preset` is what the model's file,
    `name`, says of how it is sampled, `recipe` how the MMDiT is quantised.
    """
    model, vae = model.cpu(), vae.cpu()
    sizes = {
        "hidden_size": config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "intermediate_size": 4 * config.text_width,
    }
    text_metadata = {f"fewstep.text_encoder.{key}": value for key, value in sizes.items()}
    text_metadata[vocabulary.IDS] = model.text.ids.tolist()
    paths = {
        part: folder / file for part, file in FILES.items() if part != "t5" or config.t5_pieces
    }
    paths["mmdit"] = paths["mmdit"].with_stem(name)
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    named = {"general.name": preset.name, "general.license": "apache-2.0"}
    sampled = preset_to_metadata(preset)
    write_mmdit(model.mmdit, paths["mmdit"], named | sampled, recipe, SMALLER)
    write_gguf(paths["text"], "clip", named | text_metadata, _text_tensors(model))
    write_gguf(paths["vae"], "taesd", named, _vae_tensors(vae))
    if config.t5_pieces:
        write_gguf(paths["t5"], "t5encoder", named | t5_metadata(config), _t5_tensors(model.t5))
    return list(paths.values())
