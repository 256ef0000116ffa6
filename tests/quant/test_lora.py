"""LoRAs baked in the shell: all ways to name a layer give the same weights; what cannot is told."""

import pytest
import torch
from fewstep.quant import GGUFError, GGUFFile, quantize
from fewstep.quant.__main__ import main
from fewstep.quant.lora import bake, parse_lora
from fewstep.quant.lora_names import targets
from fewstep.quant.plan import make_plan
from fewstep.quant.recipes import recipe_of_type
from fewstep.quant.sources import open_source
from fewstep.quant.writer import write_gguf
from fewstep.tests.quant import models
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file

WIDTH = 256
QKV = "joint_blocks.0.x_block.attn.qkv"
PROJ = "joint_blocks.1.context_block.attn.proj"
RANK = 4


@pytest.fixture
def model(tmp_path):
    """A small SD3 of two blocks, and the path of its file."""
    state_dict = models.sd3(width=WIDTH)
    save_file(state_dict, tmp_path / "model.safetensors")
    return state_dict, str(tmp_path / "model.safetensors")


def factors(rows, cols, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, RANK, generator=g) * 0.1, torch.randn(RANK, cols, generator=g) * 0.1


def save(path, tensors):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return str(path)


def read(source, name):
    tensor = source.tensors[name]
    chunks = [tensor.read(*rows) for rows in tensor.chunks()]
    return torch.cat(chunks).view(tensor.shape)


FORMS = {
    "kohya": ("lora_unet_{flat}.lora_up.weight", "lora_unet_{flat}.lora_down.weight"),
    "ComfyUI": ("diffusion_model.{name}.lora_up.weight", "diffusion_model.{name}.lora_down.weight"),
    "PEFT": ("base_model.model.{name}.lora_B.weight", "base_model.model.{name}.lora_A.weight"),
    "PEFT, named": ("{name}.lora_B.default.weight", "{name}.lora_A.default.weight"),
    "bare": ("{name}.lora.up.weight", "{name}.lora.down.weight"),
    "OneTrainer": (
        "lora_transformer_{flat}.lora_up.weight",
        "lora_transformer_{flat}.lora_down.weight",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_name_a_layer(tmp_path, model, form):
    state_dict, path = model
    up, down = factors(3 * WIDTH, WIDTH)
    names = [text.format(name=QKV, flat=QKV.replace(".", "_")) for text in FORMS[form]]
    alpha = names[0].partition(".lora")[0] + ".alpha"
    tensors = {names[0]: up, names[1]: down, alpha: torch.tensor(2.0)}
    lora = save(tmp_path / "l.safetensors", tensors)
    baked = bake(open_source(path), [(lora, 0.5), (lora, 1.0)])
    expected = state_dict[f"{QKV}.weight"].float() + 1.5 * 2 / RANK * up @ down
    torch.testing.assert_close(read(baked, f"{QKV}.weight"), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(read(baked, f"{PROJ}.weight"), state_dict[f"{PROJ}.weight"].float())
    assert baked.notes[0] == f"baked in: {lora} at 0.5, 1 layers"


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "lora_transformer_"])
def test_diffusers_names_mean_rows_of_a_fused_weight(tmp_path, model, prefix):
    state_dict, path = model
    tensors, deltas = {}, []
    for seed, part in enumerate(("to_q", "to_k", "to_v")):
        up, down = factors(WIDTH, WIDTH, seed)
        stem = f"transformer_blocks.0.attn.{part}"
        stem = prefix + (stem if prefix.endswith(".") else stem.replace(".", "_"))
        tensors |= {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}
        deltas.append(up @ down)
    baked = bake(open_source(path), [(save(tmp_path / "l.safetensors", tensors), 1.0)])
    expected = state_dict[f"{QKV}.weight"].float() + torch.cat(deltas)
    torch.testing.assert_close(read(baked, f"{QKV}.weight"), expected, rtol=1e-5, atol=1e-6)
    tensor = baked.tensors[f"{QKV}.weight"]  # rows that begin within one part and end in another
    torch.testing.assert_close(tensor.read(200, 600), expected[200:600], rtol=1e-5, atol=1e-6)


def test_convolutions_biases_and_plain_differences(tmp_path, model):
    state_dict, path = model
    g = torch.Generator().manual_seed(1)
    up, down = torch.randn(WIDTH, RANK, 1, 1, generator=g), torch.randn(RANK, 16, 2, 2, generator=g)
    bias, plain = torch.randn(WIDTH, generator=g), torch.randn(WIDTH, WIDTH, generator=g)
    tensors = {
        "x_embedder.proj.lora_up.weight": up,
        "x_embedder.proj.lora_down.weight": down,
        "x_embedder.proj.diff_b": bias,
        f"{PROJ}.diff": plain,
    }
    baked = bake(open_source(path), [(save(tmp_path / "l.safetensors", tensors), 2.0)])
    for name, delta in (
        ("x_embedder.proj.weight", (up.flatten(1) @ down.flatten(1)).view(WIDTH, 16, 2, 2)),
        ("x_embedder.proj.bias", bias),
        (f"{PROJ}.weight", plain),
    ):
        expected = state_dict[name].float() + 2 * delta
        torch.testing.assert_close(read(baked, name), expected, rtol=1e-5, atol=1e-5)
    name = "x_embedder.proj.weight"
    expected = state_dict[name].float() + 2 * (up.flatten(1) @ down.flatten(1)).view(-1, 16, 2, 2)
    part = baked.tensors[name].read(33, 71)  # rows of two weights, from within an output channel
    torch.testing.assert_close(part, expected.view(-1, 2)[33:71], rtol=1e-5, atol=1e-5)


def test_convert_bakes_into_the_file(tmp_path, model, capsys):
    state_dict, path = model
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in state_dict.items()}
    save_file(prefixed, tmp_path / "checkpoint.safetensors")
    up, down = factors(3 * WIDTH, WIDTH)
    lora = save(
        tmp_path / "l.safetensors",
        {
            f"diffusion_model.{QKV}.lora_up.weight": up,
            f"diffusion_model.{QKV}.lora_down.weight": down,
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": up,
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": down,
            "somewhere.else.lora_up.weight": up,
            "somewhere.else.lora_down.weight": down,
        },
    )
    target = str(tmp_path / "out.gguf")
    source = str(tmp_path / "checkpoint.safetensors")
    assert main(["convert", source, target, "--type", "Q8_0", "--lora", f"{lora}:0.25"]) == 0
    said = capsys.readouterr().out
    assert "at 0.25, 1 layers; left out 1 of text encoders; 1 fit nothing, somewhere.else" in said
    blocks = quantize(state_dict[f"{QKV}.weight"].float() + 0.25 * (up @ down), T.Q8_0)
    different = GGUFFile(target).blocks(f"{QKV}.weight") != blocks
    assert different.float().mean() < 1e-3  # a sum's last bit may turn a rounding
    assert main(["convert", path, lora, "--type", "Q8_0", "--lora", lora]) == 1
    assert "is the source itself" in capsys.readouterr().err


def test_whose_schedule_a_baked_lora_leaves_is_told(tmp_path, model, capsys):
    source, target = (str(tmp_path / f"{name}.gguf") for name in ("source", "target"))
    preset = ["--preset", "flux.1-schnell"]
    assert main(["convert", model[1], source, "--type", "Q8_0", *preset]) == 0
    up, down = factors(3 * WIDTH, WIDTH)
    tensors = {f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down}
    baking = ["convert", source, target, "--type", "Q8_0"]
    baking += ["--lora", save(tmp_path / "l.safetensors", tensors)]
    for options, told in (([], True), (preset, False), (["--meta", "fewstep.cfg=2.0"], False)):
        capsys.readouterr()
        assert main([*baking, *options]) == 0
        said = capsys.readouterr().out
        assert ("schedule is still the source's, flux.1-schnell" in said) == told


def test_a_quantised_source_takes_a_lora(tmp_path, model, capsys):
    target = str(tmp_path / "q.gguf")
    assert main(["convert", model[1], target, "--type", "Q8_0", "--quiet"]) == 0
    up, down = factors(3 * WIDTH, WIDTH)
    tensors = {f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down}
    baked = bake(open_source(target), [(save(tmp_path / "l.safetensors", tensors), 1.0)])
    before = open_source(target).tensors[f"{QKV}.weight"]
    expected = before.read(0, before.rows) + up @ down
    torch.testing.assert_close(read(baked, f"{QKV}.weight"), expected, rtol=1e-5, atol=1e-6)
    assert baked.tensors[f"{QKV}.weight"].label == "Q8_0 + LoRA"


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"a.b.lora_up.weight": (8, 4), "a.b.lora_down.weight": (4, 8)}, "fits no tensor of"),
        ({"lora_te_x.lora_up.weight": (8, 4), "lora_te_x.lora_down.weight": (4, 8)}, "fits no"),
        ({f"{QKV}.lora_up.weight": (8, 4)}, r"has no '.*lora_down\.weight' beside it"),
        (
            {f"{QKV}.lora_up.weight": (768, 4), f"{QKV}.lora_down.weight": (4, 8)},
            r"\(768, 4\) @ \(4, 8\), which does not fit 768 rows of '.*qkv.weight' \(768, 256\)",
        ),
        (
            {f"{QKV}.lora_up.weight": (768, 4), f"{QKV}.lora_down.weight": (3, 256)},
            "which does not fit",
        ),
        ({f"{QKV}.diff": (768,)}, "which does not fit"),
        ({f"{QKV}.diff_b": (768, 1)}, "which does not fit"),
        (
            {f"{QKV}.lora_up.weight": (768, 0), f"{QKV}.lora_down.weight": (0, 256)},
            "which does not fit",
        ),
        (
            {
                f"{QKV}.lora_up.weight": (768, 4),
                f"{QKV}.lora_down.weight": (),
                f"{QKV}.alpha": (),
            },
            "which does not fit",
        ),
        (
            {
                f"{QKV}.lora_up.weight": (768, 4),
                f"{QKV}.lora_down.weight": (4, 256),
                f"{QKV}.alpha": (0,),
            },
            r"'.*qkv\.alpha' is no number",
        ),
        ({f"{QKV}.lokr_w1": (4, 4)}, "makes it a LoKr, which cannot be baked here: load it in"),
        ({f"{QKV}.hada_w1_a": (4, 4)}, "makes it a LoHa"),
        ({f"{QKV}.dora_scale": (4, 4)}, "makes it a DoRA"),
        ({}, "fits no tensor"),
    ],
)
def test_what_cannot_be_baked_is_told_by_name(tmp_path, model, tensors, said):
    tensors = {name: torch.ones(shape) for name, shape in tensors.items()}
    lora = save(tmp_path / "l.safetensors", tensors)
    with pytest.raises(GGUFError, match=rf"l\.safetensors: .*{said}"):
        bake(open_source(model[1]), [(lora, 1.0)])


def test_low_rank_for_a_vector_is_told(tmp_path):
    name = "joint_blocks.0.x_block.norm.weight"
    save_file({name: torch.ones(8)} | models.sd3(), tmp_path / "m.safetensors")
    factors = {"up": torch.ones(8, 4), "down": torch.ones(4, 1)}
    stem = name.removesuffix("weight")
    tensors = {f"{stem}lora_{kind}.weight": tensor for kind, tensor in factors.items()}
    lora = save(tmp_path / "l.safetensors", tensors)
    with pytest.raises(GGUFError, match=r"l\.safetensors: .*which does not fit 8 rows"):
        bake(open_source(str(tmp_path / "m.safetensors")), [(lora, 1.0)])


def test_pickles_and_missing_files_are_told(tmp_path, model, capsys):
    (tmp_path / "l.pt").write_bytes(b"PK\3\4")
    for lora, said in (("l.pt", "a pickle"), ("gone.safetensors", "No such file")):
        arguments = ["convert", model[1], str(tmp_path / "o.gguf"), "--type", "Q8_0"]
        assert main([*arguments, "--lora", f"{tmp_path}/{lora}:1"]) == 1
        error = capsys.readouterr().err
        assert lora in error and said in error and error.count("\n") == 1
    assert not (tmp_path / "o.gguf").exists()


def test_what_was_quantised_and_delicate_stays_in_its_type(tmp_path):
    """As in the source, not as floats: the file would grow."""
    delicate = "final_layer.linear"
    blocks = {
        name: (quantize(tensor.float(), T.Q8_0), T.Q8_0, tensor.shape)
        if name in (f"{QKV}.weight", f"{delicate}.weight")
        else tensor
        for name, tensor in models.sd3(width=WIDTH).items()
    }
    write_gguf(tmp_path / "m.gguf", "sd3", {}, blocks.items())
    up, down = factors(64, WIDTH)
    lora = save(
        tmp_path / "l.safetensors",
        {f"{delicate}.lora_up.weight": up, f"{delicate}.lora_down.weight": down},
    )
    baked = bake(open_source(str(tmp_path / "m.gguf")), [(lora, 1.0)])
    (choice,) = (
        choice
        for choice in make_plan(baked, recipe_of_type(T.Q4_0)).choices
        if choice.name == f"{delicate}.weight"
    )
    assert choice.qtype is T.Q8_0 and choice.source.qtype is None  # made anew, not copied


def test_strengths():
    assert parse_lora("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert parse_lora("a.safetensors:-1") == ("a.safetensors", -1.0)
    assert parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_lora(r"C:\loras\a.safetensors") == (r"C:\loras\a.safetensors", 1.0)

    with pytest.raises(GGUFError, match="nan is no strength"):
        parse_lora("a.safetensors:nan")


def test_a_strength_that_is_no_number_is_told_of_a_file_that_there_is(tmp_path):
    file = tmp_path / "a.safetensors"
    file.touch()
    with pytest.raises(GGUFError, match="'abc' is no strength: it takes a number"):
        parse_lora(f"{file}:abc")
    odd = tmp_path / "a.safetensors:abc"
    odd.touch()
    assert parse_lora(str(odd)) == (str(odd), 1.0)


def test_rows_of_fused_weights_cover_them_once():
    """FLUX's linear1 holds queries, keys, values and a feed-forward."""

    class Stored:
        shape, cols = (7 * 64, 64), 64

    known = targets({"single_blocks.3.linear1.weight": Stored()}, "flux")
    stem = "single_transformer_blocks_3_"
    rows = [
        (known[stem + part].first, known[stem + part].last)
        for part in ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp")
    ]
    assert rows == [(0, 64), (64, 128), (128, 192), (192, 448)]
