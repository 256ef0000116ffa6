"""Write a trained demo model as the three GGUF files that ship, named as ComfyUI names tensors."""

from collections.abc import Iterator
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as QType
from gguf.quants import quantize
from torch import Tensor, nn

from ..distill.model import END, FlowModel
from ..distill.teacher import TeacherConfig
from ..flow import Preset, preset_to_metadata, uniform
from ..quant import write_gguf

NAME = "fewstep-demo"
FILES = {
    "mmdit": f"diffusion_models/{NAME}.gguf",
    "text": f"text_encoders/{NAME}-clip-l.gguf",
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
# Where SD3 checkpoints usually keep more than 8 bits: what meets noise, time, text and pixels.
_DELICATE = ("x_embedder.", "t_embedder.", "y_embedder.", "final_layer.", "pos_embed")

Entry = tuple[str, Tensor | tuple[Tensor, QType, tuple[int, ...]]]


def _q8_0(name: str, weight: Tensor) -> Entry:
    blocks = torch.from_numpy(quantize(weight.float().numpy(), QType.Q8_0))
    return name, (blocks, QType.Q8_0, tuple(weight.shape))


def _mmdit_tensors(mmdit: nn.Module) -> Iterator[Entry]:
    for name, value in mmdit.state_dict().items():
        if value.ndim == 2 and not name.startswith(_DELICATE):
            yield _q8_0(name, value)
        else:
            yield name, value.float() if value.ndim < 2 else value.half()


def _text_tensors(model: FlowModel) -> Iterator[Entry]:
    text = model.text
    table = torch.zeros(END + 1, text.table.shape[1])  # words never seen stay zero
    table[text.ids] = text.table[1:].float()
    for name, value in text.clip.state_dict().items():
        if name == "text_model.embeddings.token_embedding.weight":
            yield _q8_0(name, table)
        else:
            yield name, value.float() if value.ndim < 2 else value.half()


def _vae_tensors(vae: nn.Module) -> Iterator[Entry]:
    for name, value in vae.state_dict().items():
        yield name, value.float().reshape(-1) if value.ndim < 2 else value.half()


@torch.no_grad()
def export(model: FlowModel, vae: nn.Module, config: TeacherConfig, folder: Path) -> list[Path]:
    """Write the three files below `folder`, each whole or not at all; their paths."""
    model, vae = model.cpu(), vae.cpu()
    sizes = {
        "hidden_size": config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "intermediate_size": 4 * config.text_width,
    }
    text_metadata = {f"fewstep.text_encoder.{key}": value for key, value in sizes.items()}
    paths = {part: folder / name for part, name in FILES.items()}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    named = {"general.name": NAME, "general.license": "apache-2.0"}
    preset = preset_to_metadata(PRESET)
    write_gguf(paths["mmdit"], "sd3", named | preset, _mmdit_tensors(model.mmdit))
    write_gguf(paths["text"], "clip", named | text_metadata, _text_tensors(model))
    write_gguf(paths["vae"], "taesd", named, _vae_tensors(vae))
    return list(paths.values())
