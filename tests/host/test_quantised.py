"""What `python -m quant convert` makes, loaded and sampled by the host."""

import comfy.sd
import pytest
import torch
from fewstep.host import loading
from fewstep.host.layout import is_gguf
from fewstep.quant import GGUFFile, dequantize
from fewstep.quant.__main__ import main
from fewstep.tests.host import toys
from fewstep.tests.host.test_loading import sample, weight
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file


def dense(path):
    """The file's tensors as float32."""
    file = GGUFFile(path)
    return {
        name: dequantize(file.blocks(name), info.qtype, info.shape)
        for name, info in file.tensors.items()
    }


@pytest.mark.parametrize("recipe", ["flash-16", "flash-8", "flash-6", "flash-4"])
def test_diffusion_model_samples_as_its_dequantised_weights_do(exact, tmp_path, recipe):
    """From an all-in-one checkpoint, whose prefix is stripped."""
    state_dict = {"model.diffusion_model." + k: v for k, v in toys.mmdit(depth=4).items()}
    state_dict["first_stage_model.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3)
    save_file(state_dict, tmp_path / "a.safetensors")
    target = tmp_path / "a.gguf"
    preset = ["--preset", "sd3.5-large-turbo"]
    source = str(tmp_path / "a.safetensors")
    assert main(["convert", source, str(target), "--recipe", recipe, *preset]) == 0
    model = loading.load_diffusion_model(str(target))
    assert is_gguf(weight(model)) == (recipe != "flash-16")
    assert model.attachments["fewstep"].name == "sd3.5-large-turbo"
    reference = comfy.sd.load_diffusion_model_state_dict(dense(target))
    assert torch.equal(sample(model, 1), sample(reference, 1))


def test_text_encoder_is_loaded(tmp_path):
    save_file(toys.clip_l(), tmp_path / "a.safetensors")
    target = tmp_path / "a.gguf"
    sizes = [f"fewstep.text_encoder.{key}={value}" for key, value in toys.CLIP_SIZES.items()]
    meta = [word for size in sizes for word in ("--meta", size)]
    source = str(tmp_path / "a.safetensors")
    assert main(["convert", source, str(target), "--type", "Q8_0", *meta]) == 0
    assert GGUFFile(target).tensors["text_model.encoder.layers.0.mlp.fc1.weight"].qtype is T.Q8_0
    clip = loading.load_text_encoders([str(target)])
    tokens = clip.tokenize("a red circle")
    assert clip.encode_from_tokens(tokens).isfinite().all()
