"""Read the GGUF files that ship back into the modules they were trained in."""

from pathlib import Path

from torch import Tensor, nn

from ..distill.model import FlowModel
from ..distill.teacher import TeacherConfig
from ..host import modules, names, vocabulary
from ..quant import GGUFFile, dequantize
from .export import FILES, NAME

MODELS = Path(__file__).parent / "models"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a GGUF file, dequantised to float32."""
    file = GGUFFile(path)
    return {
        name: dequantize(file.blocks(name), info.qtype, info.shape)
        if info.is_quantized
        else file.tensor(name).float()
        for name, info in file.tensors.items()
    }


def load_shipped(
    folder: Path = MODELS,
    config: TeacherConfig | None = None,
    ids: tuple[int, ...] = (),
    name: str = NAME,
) -> tuple[FlowModel, nn.Module]:
    """The flow model `name`, whose token table holds `ids`, and the VAE below `folder`.

    A `config` with pieces of T5's reads the T5 too.
    """
    model = FlowModel(config or TeacherConfig(), ids)
    text = read_weights(folder / FILES["text"])
    vocabulary.spread(FILES["text"], text, GGUFFile(folder / FILES["text"]).metadata)
    model.text.table.data[1:] = text.pop(vocabulary.TABLE)[model.text.ids]
    model.text.clip.load_state_dict(text, strict=False)  # but for the table, taken above
    model.mmdit.load_state_dict(read_weights((folder / FILES["mmdit"]).with_stem(name)))
    if model.config.t5_pieces:
        read = read_weights(folder / FILES["t5"])
        renamed = {names.text_encoder_name(theirs, "t5encoder"): w for theirs, w in read.items()}
        model.t5.load_state_dict(renamed)
    vae = modules.build_taesd()
    vae.load_state_dict(read_weights(folder / FILES["vae"]))
    return model.eval().requires_grad_(False), vae.eval().requires_grad_(False)
