"""Our tables of LoRA names against the host's, and a LoRA baked here against the host's own."""

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch
from fewstep.quant.lora import bake
from fewstep.quant.lora_names import find, targets
from fewstep.quant.sources import open_source
from fewstep.tests.host import toys
from safetensors.torch import load_file, save_file

UNET = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}  # SDXL's


# Norms, of which LoRAs have none; parts that no trainer touches.
NOT_TAKEN = (".norm_", "conv_norm_out", "all_final_layer", "all_x_embedder", "class_embedding",
             "controlnet_x_embedder")  # fmt: skip


class Stored:
    """A weight's shape is all that names need."""

    def __init__(self, rows, cols):
        self.shape, self.cols = (rows, cols), cols


def flux_map():
    config = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 64}
    return comfy.utils.flux_to_diffusers(config)


def rows_of(name):
    """A plausible number of rows of 64 columns, by what is fused in them."""
    if "linear1" in name:
        return 7 * 64
    if "adaLN_modulation" in name:  # of SD3's last context block a third
        return 2 * 64 if name.startswith("joint_blocks.0.context") else 6 * 64
    return 3 * 64 if "qkv" in name else 64


@pytest.mark.parametrize(
    "architecture, table",
    [
        ("sd3", lambda: comfy.utils.mmdit_to_diffusers({"depth": 1, "num_blocks": 2})),
        ("flux", flux_map),
        ("lumina2", lambda: comfy.utils.z_image_to_diffusers({"n_layers": 2, "dim": 64})),
        ("sdxl", lambda: comfy.utils.unet_to_diffusers(UNET)),
    ],
)
def test_names_mean_what_the_host_takes_them_for(architecture, table):
    theirs = {
        name: target if isinstance(target, tuple) else (target,)
        for name, target in table().items()
        if name.endswith(".weight")
    }
    weights = {target[0]: Stored(rows_of(target[0]), 64) for target in theirs.values()}
    known = targets(weights, architecture)
    for name, (weight, *where) in theirs.items():
        found = find(name.removesuffix(".weight"), known)
        if found is None:
            assert any(part in name for part in NOT_TAKEN) or "swap" in str(where), name
            continue
        first, last = (0, rows_of(weight)) if not where else (where[0][1], sum(where[0][1:]))
        assert (found.weight, found.first, found.last) == (weight, first, last), name


def test_bakes_as_the_host_does(tmp_path):
    state_dict = toys.mmdit()
    save_file(state_dict, tmp_path / "m.safetensors")
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for stem, rows, cols in (
        ("transformer.transformer_blocks.0.attn.to_k", 128, 128),
        ("transformer.transformer_blocks.1.ff.net.2", 128, 512),
        ("diffusion_model.joint_blocks.1.x_block.attn.qkv", 384, 128),
        ("lora_unet_joint_blocks_0_context_block_mlp_fc1", 512, 128),
    ):
        tensors[f"{stem}.lora_up.weight"] = torch.randn(rows, 4, generator=g) * 0.1
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, cols, generator=g) * 0.1
        tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "l.safetensors")
    model = comfy.sd.load_diffusion_model_state_dict(load_file(tmp_path / "m.safetensors"))
    patched = comfy.sd.load_lora_for_models(model, None, dict(tensors), 0.6, 0)[0]
    ours = bake(open_source(tmp_path / "m.safetensors"), [(str(tmp_path / "l.safetensors"), 0.6)])
    changed = 0
    for name, weight in state_dict.items():
        tensor = ours.tensors[name]
        got = tensor.read(0, tensor.rows).view(tensor.shape)
        patches = patched.patches.get(f"diffusion_model.{name}", [])
        expected = comfy.lora.calculate_weight(patches, weight.clone(), name)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        changed += bool(patches)
    assert changed == 4
