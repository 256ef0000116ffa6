"""Which tensor gets which type: architectures, roles, mixes, fallbacks, what is left out."""

import pytest
import torch
from fewstep.quant import GGUFError
from fewstep.quant.architectures import ARCHITECTURES, UNKNOWN, find_architecture
from fewstep.quant.plan import make_plan
from fewstep.quant.recipes import RECIPES, recipe_named, recipe_of_type, role_of
from fewstep.quant.sources import open_source
from fewstep.tests.quant import models
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file

# A weight of each role as the published checkpoints name it.
NAMES = {
    "qkv": [
        "joint_blocks.3.x_block.attn.qkv.weight",
        "joint_blocks.3.x_block.attn2.qkv.weight",
        "double_blocks.0.img_attn.qkv.weight",
        "layers.4.attention.qkv.weight",
    ],
    "value": [
        "input_blocks.4.1.transformer_blocks.0.attn1.to_v.weight",
        "blocks.7.self_attn.v.weight",
        "transformer_blocks.0.attn.add_v_proj.weight",
        "double_layers.0.attn.w1v.weight",
        "encoder.block.0.layer.0.SelfAttention.v.weight",
    ],
    "attn_out": [
        "joint_blocks.3.context_block.attn.proj.weight",
        "double_blocks.0.txt_attn.proj.weight",
        "transformer_blocks.1.attn.to_out.0.weight",
        "blocks.7.cross_attn.o.weight",
        "layers.4.attention.out.weight",
    ],
    "ffn_down": [
        "joint_blocks.3.x_block.mlp.fc2.weight",
        "double_blocks.11.img_mlp.2.weight",
        "input_blocks.4.1.transformer_blocks.0.ff.net.2.weight",
        "blocks.7.ffn.2.weight",
        "transformer_blocks.0.txt_mlp.net.2.weight",
        "layers.4.feed_forward.w2.weight",
    ],
    "modulation": [
        "joint_blocks.3.x_block.adaLN_modulation.1.weight",
        "double_blocks.0.img_mod.lin.weight",
        "transformer_blocks.0.txt_mod.1.weight",
    ],
    None: [
        "joint_blocks.3.x_block.mlp.fc1.weight",
        "double_blocks.0.img_mlp.0.weight",
        "single_blocks.0.linear1.weight",
        "blocks.7.self_attn.q.weight",
        "blocks.7.self_attn.k.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "layers.4.feed_forward.w1.weight",
        "joint_blocks.3.x_block.attn.qkv.bias",
    ],
}


@pytest.fixture
def plan(tmp_path):
    """plan(state dict, recipe name or type, …) -> Plan, by way of a file."""

    def make(state_dict, recipe, **options):
        save_file(state_dict, tmp_path / "m.safetensors")
        recipe = recipe_of_type(recipe) if isinstance(recipe, T) else recipe_named(recipe)
        return make_plan(open_source(tmp_path / "m.safetensors"), recipe, **options)

    return make


def types(plan):
    return {choice.name: choice.qtype for choice in plan.choices}


@pytest.mark.parametrize("role", NAMES)
def test_roles(role):
    assert {name: role_of(name) for name in NAMES[role]} == dict.fromkeys(NAMES[role], role)


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.tag)
def test_architectures_are_told_from_their_marks(plan, row):
    for marks in row.marks:
        assert find_architecture(marks) is row
        for prefix in ("", "model.diffusion_model."):
            made = plan({prefix + mark: torch.ones(64, 64) for mark in marks}, T.Q8_0)
            assert made.architecture is row and len(made.choices) == len(marks)


def test_unknown_architecture_is_said_and_can_be_set(plan):
    made = plan(models.names_of("layer.weight", "time_embedding.1.weight"), T.Q8_0)
    assert made.architecture is UNKNOWN and "not recognised" in made.notes[0]
    assert types(made) == {"layer.weight": T.Q8_0, "time_embedding.1.weight": T.F16}
    assert plan(models.names_of("a.weight"), T.Q8_0, architecture="flux").architecture.tag == "flux"
    with pytest.raises(GGUFError, match=r"no architecture is called 'flex' \(known: sd3"):
        plan(models.names_of("a.weight"), T.Q8_0, architecture="flex")


def test_diffusers_names_are_refused(plan):
    with pytest.raises(GGUFError, match="diffusers' names"):
        plan(models.names_of("transformer_blocks.0.attn.add_q_proj.weight"), T.Q8_0)


def test_open_clips_names_are_refused(plan):
    """As SDXL's checkpoint has them; whole, it is converted."""
    prefix, name = "conditioner.embedders.1.model.", "transformer.resblocks.0.ln_1.weight"
    with pytest.raises(GGUFError, match="OpenCLIP's names"):
        plan(models.names_of(prefix + name), T.Q8_0, prefix=prefix)
    assert set(types(plan(models.names_of(prefix + name), T.Q8_0))) == {prefix + name}


def test_of_a_checkpoint_the_diffusion_model_is_taken(plan):
    state_dict = {"model.diffusion_model." + name: t for name, t in models.sd3().items()}
    state_dict |= models.names_of("first_stage_model.decoder.conv_in.weight")
    state_dict |= models.names_of("text_encoders.clip_l.a", "text_encoders.t5xxl.b", "odd")
    made = plan(state_dict, T.Q8_0)
    assert set(types(made)) == set(models.sd3())
    assert sorted(made.notes) == [
        "left out: 1 tensors (VAE)",
        "left out: 1 tensors (other)",
        "left out: 2 tensors (text encoders)",
    ]
    made = plan(state_dict, T.Q8_0, prefix="first_stage_model.")
    assert set(types(made)) == {"decoder.conv_in.weight"} and made.architecture.tag == "vae"
    with pytest.raises(GGUFError, match="begins with 'nothing'"):
        plan(state_dict, T.Q8_0, prefix="nothing")


def test_a_checkpoint_taken_whole_is_called_by_its_diffusion_model(plan):
    state_dict = {"model.diffusion_model." + name: t for name, t in models.sd3().items()}
    state_dict |= models.names_of("first_stage_model.decoder.conv_in.weight")
    made = plan(state_dict, T.Q8_0, prefix="")
    assert set(types(made)) == set(state_dict) and made.architecture.tag == "sd3"
    assert types(made)["model.diffusion_model.final_layer.linear.weight"] is T.BF16  # delicate


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plans_every_type(plan, name):
    made = types(plan(models.sd3(depth=4), name))
    assert made["joint_blocks.0.x_block.attn.qkv.bias"] is T.F32
    assert made["final_layer.linear.weight"] is T.BF16
    base = RECIPES[name].base
    assert made["joint_blocks.2.x_block.mlp.fc1.weight"] is (T.BF16 if base is None else base)


def test_mixes_are_llama_cpps(plan):
    made = types(plan(models.sd3(depth=8), "Q4_K_M"))
    qkv = {made[name] for name in made if name.endswith("qkv.weight")}
    assert qkv == {T.Q5_K}
    down = [
        made[f"joint_blocks.{i}.{side}.mlp.fc2.weight"]
        for i in range(8)
        for side in ("context_block", "x_block")
    ]
    high = [i for i in range(16) if i < 2 or i >= 14 or (i - 2) % 3 == 2]  # use_more_bits
    assert [i for i, qtype in enumerate(down) if qtype is T.Q6_K] == high
    assert set(down) == {T.Q4_K, T.Q6_K}
    small = types(plan(models.sd3(depth=8), "Q4_K_S"))
    first = [name for name, qtype in small.items() if qtype is T.Q5_K]
    assert sorted(first) == [f"joint_blocks.0.{s}_block.mlp.fc2.weight" for s in ("context", "x")]


def test_layers_are_counted_as_numbers(plan):
    """Block 10 comes after block 9, not after block 1."""
    names = [f"blocks.{i}.ffn.2.weight" for i in range(16)]
    made = types(plan(models.names_of(*names), "Q4_K_S"))
    assert [name for name in names if made[name] is T.Q5_K] == names[:2]


def test_rows_that_do_not_divide_fall_back_and_say_so(plan):
    tensors = {
        "a.weight": torch.ones(64, 96),
        "b.weight": torch.ones(64, 160),
        "c.weight": torch.ones(64, 50),
        "d.weight": torch.ones(64, 512),
    }
    for qtype, fallback in (
        (T.Q6_K, T.Q8_0),
        (T.Q5_K, T.Q5_1),
        (T.Q4_K, T.Q5_0),
        (T.Q2_K, T.IQ4_NL),
    ):
        made = plan(tensors, qtype)
        wanted = {"a.weight": fallback, "b.weight": fallback, "c.weight": T.F16, "d.weight": qtype}
        assert types(made) == wanted
        told = [note for note in made.notes if note.startswith("rows of")]
        assert len(told) == 3 and fallback.name in told[0] and "a.weight" in told[0]


def test_overrides_go_first(plan):
    made = types(plan(models.sd3(), T.Q8_0, overrides=[("final_*", T.F32), ("*.qkv.*", T.F16)]))
    assert made["final_layer.linear.weight"] is T.F32
    assert made["joint_blocks.0.x_block.attn.qkv.weight"] is T.F16
    with pytest.raises(GGUFError, match=r"no tensor's name fits 'nope\*'"):
        plan(models.sd3(), T.Q8_0, overrides=[("nope*", T.F32)])


def test_what_gguf_cannot_store_is_left_out_and_said(plan):
    tensors = models.names_of("a.weight") | {"flag": torch.ones(3, dtype=torch.bool)}
    made = plan(tensors, T.Q8_0)
    assert set(types(made)) == {"a.weight"}
    assert "left out: flag, since GGUF has no type for BOOL" in made.notes


def test_types_that_cannot_be_written_are_told_before_the_work(plan, monkeypatch):
    monkeypatch.setattr("fewstep.quant.plan.writable_types", lambda: [T.F32, T.Q8_0])
    with pytest.raises(GGUFError, match=r"would be TQ1_0, .* not written .writable: F32, Q8_0"):
        plan(models.names_of("a.weight"), T.TQ1_0)


def test_t5_gets_llama_cpps_names(plan):
    stem = "encoder.block.{}.layer.{}"
    state_dict = {
        "shared.weight": torch.ones(96, 64),
        "encoder.embed_tokens.weight": torch.ones(96, 64),
        stem.format(0, "0.SelfAttention.q.weight"): torch.ones(64, 64),
        stem.format(0, "0.SelfAttention.relative_attention_bias.weight"): torch.ones(32, 64),
        stem.format(11, "1.DenseReluDense.wo.weight"): torch.ones(64, 128),
        "encoder.final_layer_norm.weight": torch.ones(64),
    }
    made = plan({"text_encoders.t5." + k: v for k, v in state_dict.items()}, T.Q8_0,
                prefix="text_encoders.t5.")  # fmt: skip
    assert made.architecture.tag == "t5encoder"
    assert types(made) == {
        "token_embd.weight": T.Q8_0,
        "enc.blk.0.attn_q.weight": T.Q8_0,
        "enc.blk.0.attn_rel_b.weight": T.F32,
        "enc.blk.11.ffn_down.weight": T.Q8_0,
        "enc.output_norm.weight": T.F32,
    }
    with pytest.raises(GGUFError, match="the vocabulary in it"):
        plan(state_dict | {"spiece_model": torch.ones(9, dtype=torch.uint8)}, T.Q8_0)


def test_flux_norms_get_their_published_names(plan):
    """A MODEL has ComfyUI's own, and so has what ComfyUI saved."""
    norms = [
        "double_blocks.0.img_attn.norm.key_norm",
        "single_blocks.7.norm.query_norm",
        "distilled_guidance_layer.norms.4",
    ]
    matrices = ["double_blocks.0.img_attn.proj.weight", "single_blocks.7.linear1.weight"]
    for kind in (".weight", ".scale"):
        made = plan(models.names_of(*matrices, *(norm + kind for norm in norms)), T.Q8_0)
        assert set(types(made)) == {*matrices, *(norm + ".scale" for norm in norms)}
    other = {"blocks.0.norm.key_norm.weight": torch.ones(64)}
    assert set(types(plan(other, T.Q8_0))) == set(other)


def test_parameters_and_five_dimensions_are_not_bf16(plan):
    """city96's loader unpacks bf16 only in the layers that it knows."""
    shapes = {
        "patch_embedding.weight": (64, 16, 1, 2, 2),
        "pos_embed": (1, 16, 256),
        "large.weight": (1024, 1024, 3),
        "conv.weight": (64, 64, 3, 3),
    }
    for dtype, wanted in {
        torch.float32: (T.F32, T.F32, T.F16, T.F16),
        torch.bfloat16: (T.F32, T.F32, T.F16, T.BF16),
        torch.float16: (T.F16, T.F16, T.F16, T.F16),  # nothing is gained by more bits
    }.items():
        tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
        assert types(plan(tensors, T.Q8_0)) == dict(zip(shapes, wanted, strict=True))


def test_file_type_is_what_most_tensors_have(plan):
    for dtype, wanted in ((torch.bfloat16, "MOSTLY_BF16"), (torch.float16, "MOSTLY_F16")):
        assert plan(models.sd3(dtype=dtype), "flash-16").file_type.name == wanted
    assert plan(models.sd3(), "Q4_K_M").file_type.name == "MOSTLY_Q4_K_M"
    assert plan(models.sd3(), T.Q4_K).file_type.name == "MOSTLY_Q4_K_S"
    assert plan(models.sd3(), T.IQ4_XS).file_type.name == "MOSTLY_IQ4_XS"
