"""GGUF files through the host's own loaders: equal to the dequantised model, bit for bit, where the
host is asked for float32 (`exact`; test_cpu.py has the other way).
"""

import comfy.model_patcher
import comfy.sample
import comfy.sd
import pytest
import torch
from comfy.model_patcher import LowVramPatch
from comfy.taesd.taesd import TAESD
from fewstep.host import loading, ops
from fewstep.host.layout import is_gguf, wrap
from fewstep.host.ops import gguf_ops
from fewstep.quant import write_gguf
from fewstep.tests.host import toys
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file, save_file

QKV = "joint_blocks.0.x_block.attn.qkv"


def sample(model, steps=2):
    g = torch.Generator().manual_seed(3)
    cond = [
        [
            torch.randn(1, 77, 4096, generator=g),
            {"pooled_output": torch.randn(1, 2048, generator=g)},
        ]
    ]
    latent = torch.zeros(1, 16, 8, 8)
    noise = torch.randn(latent.shape, generator=g)
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", cond, cond, latent, seed=4
    )


def weight(model, layer=QKV):
    return comfy.utils.get_attr(model.model.diffusion_model, layer + ".weight")


def lora(strength=0.1):
    g = torch.Generator().manual_seed(5)
    up, down = torch.randn(384, 4, generator=g), torch.randn(4, 128, generator=g)
    key = f"diffusion_model.{QKV}."
    return {key + "lora_up.weight": up * strength, key + "lora_down.weight": down * strength}


def with_lora(model, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, lora(), strength, 0)[0]


@pytest.mark.parametrize("qtype", [T.Q8_0, T.Q4_0, T.F16, T.BF16])
def test_samples_as_the_dequantised_model_does(exact, tmp_path, qtype):
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit(), qtype)
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    reference = comfy.sd.load_diffusion_model_state_dict(dense)
    assert torch.equal(sample(model), sample(reference))


@pytest.mark.parametrize("qtype", [T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K])
def test_k_quants_sample_as_the_dequantised_model_does(exact, tmp_path, qtype):
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit(depth=4), qtype)
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    assert is_gguf(weight(model))
    reference = comfy.sd.load_diffusion_model_state_dict(dense)
    assert torch.equal(sample(model, 1), sample(reference, 1))


def test_is_a_stock_patcher_that_counts_quantised_bytes(tmp_path):
    state_dict = toys.mmdit()
    path = tmp_path / "m.gguf"
    toys.write(path, "sd3", state_dict)
    model = loading.load_diffusion_model(str(path))
    assert type(model) is comfy.model_patcher.ModelPatcher
    assert is_gguf(weight(model))
    data = sum(t.numel() for t in state_dict.values())
    assert data < model.model_size() < 1.2 * data  # 34/32 bytes an element, and a few floats


def test_models_merge_by_the_stock_way(exact, tmp_path):
    dense = [toys.write(tmp_path / f"{seed}.gguf", "sd3", toys.mmdit(seed=seed)) for seed in (0, 1)]
    models = [loading.load_diffusion_model(str(tmp_path / f"{seed}.gguf")) for seed in (0, 1)]
    references = [comfy.sd.load_diffusion_model_state_dict(d) for d in dense]
    assert torch.equal(sample(merge(*models)), sample(merge(*references)))


def merge(first, second):
    """As `ModelMergeSimple` does."""
    merged = first.clone()
    for key, patch in second.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 0.25, 0.75)
    return merged


def test_convolutions_stay_quantised():
    conv = gguf_ops("toy").Conv2d(8, 32, 2, padding=1)
    blocks, qtype, _ = toys.quantised(torch.randn(32, 32), T.Q8_0)
    conv.load_state_dict({"weight": wrap(blocks, qtype, (32, 8, 2, 2)), "bias": torch.zeros(32)})
    x = torch.randn(1, 8, 5, 5)
    exact = wrap(blocks, qtype, (32, 8, 2, 2), torch.float32).dequantize()
    assert is_gguf(conv.weight)
    assert torch.equal(conv(x), torch.nn.functional.conv2d(x, exact, torch.zeros(32), padding=1))


def test_embedding_dequantises_only_the_rows_asked_for(monkeypatch):
    seen = []
    real = ops.dequantize_rows

    def spy(blocks, qtype, length, rows, dtype):
        seen.append(rows.numel())
        return real(blocks, qtype, length, rows, dtype)

    monkeypatch.setattr(ops, "dequantize_rows", spy)
    table = gguf_ops("toy").Embedding(1000, 64)
    blocks, qtype, shape = toys.quantised(torch.randn(1000, 64), T.Q8_0)
    table.load_state_dict({"weight": wrap(blocks, qtype, shape)})
    tokens = torch.tensor([[3, 999, 3], [0, 1, 2]])
    exact = wrap(blocks, qtype, shape, torch.float32).dequantize()
    assert torch.equal(table(tokens, out_dtype=torch.float32), exact[tokens])
    assert seen == [6]


def test_loads_text_encoder_with_its_sizes_from_the_metadata(exact, tmp_path):
    sizes = {f"fewstep.text_encoder.{k}": v for k, v in toys.CLIP_SIZES.items()}
    dense = toys.write(tmp_path / "l.gguf", "clip", toys.clip_l(), metadata=sizes)
    clip = loading.load_text_encoders([str(tmp_path / "l.gguf")])
    tokens = clip.tokenize("a red circle")
    cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    assert cond.shape == (1, 77, 4096) and pooled.shape == (1, 64 + 1280)
    options = {"model_config": dict(toys.CLIP_SIZES), "dtype": torch.float32}
    reference = comfy.sd.load_text_encoder_state_dicts(
        [dense], clip_type=comfy.sd.CLIPType.SD3, model_options=options
    )
    assert torch.equal(cond, reference.encode_from_tokens(tokens))


def test_weight_with_nan_is_named(tmp_path):
    state_dict = toys.mmdit()
    path = tmp_path / "nan.gguf"
    state_dict["context_embedder.weight"][5, 7] = float("nan")
    toys.write(path, "sd3", state_dict, T.F16)
    model = loading.load_diffusion_model(str(path))
    with pytest.raises(ValueError, match=r"nan\.gguf: tensor context_embedder\.weight holds NaN"):
        sample(model, 1)


def test_small_tensor_with_nan_is_named_while_loading(tmp_path):
    state_dict = toys.mmdit()
    state_dict[QKV + ".bias"][5] = float("inf")
    toys.write(tmp_path / "inf.gguf", "sd3", state_dict)
    with pytest.raises(ValueError, match=rf"inf\.gguf: tensor {QKV}\.bias holds NaN or infinity"):
        loading.load_diffusion_model(str(tmp_path / "inf.gguf"))


def test_wrong_shape_is_named(tmp_path):
    state_dict = toys.mmdit()
    state_dict[QKV + ".weight"] = torch.zeros(384, 64)
    toys.write(tmp_path / "m.gguf", "sd3", state_dict)
    with pytest.raises(ValueError, match=rf"m\.gguf.*{QKV}\.weight has shape \(384, 64\)"):
        loading.load_diffusion_model(str(tmp_path / "m.gguf"))


LOADERS = {
    "diffusion model": loading.load_diffusion_model,
    "text encoder": lambda path: loading.load_text_encoders([path]),
    "VAE": loading.load_vae,
}


@pytest.mark.parametrize("wanted", LOADERS)
@pytest.mark.parametrize("kind", LOADERS)
def test_file_in_the_wrong_loader_is_told_the_right_one(tmp_path, kind, wanted):
    if kind == wanted:
        return
    model = {
        "diffusion model": toys.mmdit,
        "text encoder": toys.clip_l,
        "VAE": lambda: {"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)},
    }[kind]()
    toys.write(tmp_path / "f.gguf", "x", model)
    with pytest.raises(ValueError, match=rf"f\.gguf holds a {kind}, not a {wanted}: load it with"):
        LOADERS[wanted](str(tmp_path / "f.gguf"))


def test_diffusers_names_and_unknown_files_get_a_remedy(tmp_path):
    toys.write(tmp_path / "d.gguf", "sd3", {"transformer_blocks.0.attn.to_q.weight": torch.eye(32)})
    with pytest.raises(ValueError, match=r"diffusers' names.*original checkpoint"):
        loading.load_diffusion_model(str(tmp_path / "d.gguf"))
    toys.write(tmp_path / "u.gguf", "riddle", {"some.weight": torch.eye(32)})
    with pytest.raises(ValueError, match=r"u\.gguf: this.*'riddle', first tensors some\.weight"):
        loading.load_diffusion_model(str(tmp_path / "u.gguf"))


def test_pickles_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match="pickle"):
        loading.load_diffusion_model(str(tmp_path / "m.ckpt"))


@pytest.mark.parametrize("memory", [0, 1 << 16])
@pytest.mark.parametrize("qtype", [T.Q8_0, T.F16])
def test_saving_writes_the_floats_with_the_lora(tmp_path, memory, qtype):
    """As `ModelSave` does; for weights that were not loaded the host takes another way."""
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit(), qtype)
    names = {f"model.diffusion_model.{name}": tensor for name, tensor in dense.items()}
    model = with_lora(loading.load_diffusion_model(str(tmp_path / "m.gguf")))
    model.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
    save_file(model.state_dict_for_saving(), tmp_path / "s.safetensors")
    a, b = lora().values()
    names[f"model.diffusion_model.{QKV}.weight"] += a @ b
    saved = load_file(tmp_path / "s.safetensors")
    assert saved.keys() == names.keys()
    for name, tensor in names.items():
        torch.testing.assert_close(saved[name].float(), tensor, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("memory", [0, 1])
@pytest.mark.parametrize("qtype", [T.Q8_0, T.F32])
def test_saving_leaves_out_what_other_nodes_do_to_a_weight(tmp_path, memory, qtype):
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit(), qtype)
    model = with_lora(loading.load_diffusion_model(str(tmp_path / "m.gguf")))
    model.add_weight_wrapper(f"diffusion_model.{QKV}.weight", lambda weight: weight * 2)
    model.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
    saved = model.state_dict_for_saving()[f"model.diffusion_model.{QKV}.weight"]
    a, b = lora().values()
    wanted = dense[f"{QKV}.weight"] + a @ b
    torch.testing.assert_close(saved.to("cpu").float(), wanted, rtol=2**-8, atol=1e-6)


def test_saving_rounds_once_what_the_hosts_dynamic_vram_keeps(tmp_path):
    """It marks its weights by `_v`, and unpacks them itself where they are asked for on the CPU."""
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    model = with_lora(loading.load_diffusion_model(str(tmp_path / "m.gguf")))
    layer = comfy.utils.get_attr(model.model.diffusion_model, QKV)
    layer._v = object()
    layer.weight_lowvram_function = LowVramPatch(f"diffusion_model.{QKV}.weight", model.patches)
    saved = model.state_dict_for_saving()[f"model.diffusion_model.{QKV}.weight"].cpu()
    a, b = lora().values()
    wanted = dense[f"{QKV}.weight"] + a @ b
    torch.testing.assert_close(saved.float(), wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("loads, samples", [(True, False), (False, True), (True, True)])
def test_inference_mode_does_not_matter(exact, tmp_path, loads, samples):
    """The host runs nodes in inference mode, other packs may load outside of it."""
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    with torch.inference_mode(loads):
        model = with_lora(loading.load_diffusion_model(str(tmp_path / "m.gguf")))
    with torch.inference_mode(samples):
        drawn = sample(model)
    reference = with_lora(comfy.sd.load_diffusion_model_state_dict(dense))
    torch.testing.assert_close(drawn, sample(reference), rtol=1e-4, atol=1e-4)  # LoRA apart
    model.detach()


@pytest.mark.parametrize("name", ["final_layer.linear.weight", QKV + ".weight"])
def test_missing_tensor_is_named(tmp_path, name):
    state_dict = toys.mmdit()
    del state_dict[name]
    toys.write(tmp_path / "m.gguf", "sd3", state_dict)
    with pytest.raises(ValueError, match=rf"m\.gguf: tensor {name} is missing"):
        loading.load_diffusion_model(str(tmp_path / "m.gguf"))


def test_text_encoder_without_a_projection_loads(tmp_path):
    """Many CLIP files lack it; the host makes do."""
    sizes = {f"fewstep.text_encoder.{k}": v for k, v in toys.CLIP_SIZES.items()}
    state_dict = toys.clip_l()
    del state_dict["text_projection.weight"]
    toys.write(tmp_path / "l.gguf", "clip", state_dict, metadata=sizes)
    assert loading.load_text_encoders([str(tmp_path / "l.gguf")]).tokenize("a")


@pytest.mark.parametrize(
    "sizes, said", [({"hidden_size": "big"}, "hidden_size"), ({"num_attention_heads": 7}, "heads")]
)
def test_odd_sizes_of_a_text_encoder_are_named(tmp_path, sizes, said):
    sizes = {f"fewstep.text_encoder.{k}": v for k, v in (toys.CLIP_SIZES | sizes).items()}
    toys.write(tmp_path / "l.gguf", "clip", toys.clip_l(), metadata=sizes)
    with pytest.raises(ValueError, match=rf"l\.gguf: fewstep\.text_encoder.*{said}"):
        loading.load_text_encoders([str(tmp_path / "l.gguf")])


IDS, TABLE = "fewstep.text_encoder.token_ids", "text_model.embeddings.token_embedding.weight"


def cut(tmp_path, ids, rows):
    sizes = {f"fewstep.text_encoder.{k}": v for k, v in toys.CLIP_SIZES.items()}
    state_dict = toys.clip_l()
    state_dict[TABLE] = rows(state_dict[TABLE])
    toys.write(tmp_path / "l.gguf", "clip", state_dict, metadata=sizes | {IDS: ids})
    return str(tmp_path / "l.gguf")


def test_a_token_table_that_was_cut_is_whole_again(tmp_path):
    ids = [320, 1000, 49406, 49407]
    clip = loading.load_text_encoders([cut(tmp_path, ids, lambda table: table[ids])])
    table = clip.cond_stage_model.clip_l.transformer.state_dict()[TABLE]
    table = getattr(table, "dequantize", lambda: table)().float()
    assert len(table) == 49408 and torch.allclose(table[ids], toys.clip_l()[TABLE][ids], atol=1e-2)
    assert not table[[i for i in range(49408) if i not in ids]].any()
    context, pooled = clip.encode_from_tokens(clip.tokenize("a"), return_pooled=True)
    assert context.isfinite().all() and pooled.any()


@pytest.mark.parametrize("ids", [[320, 49406, 49407], [320, 1000, 49406, 49408], [-1, 1, 2, 3]])
def test_ids_that_are_not_the_tables_are_named(tmp_path, ids):
    with pytest.raises(ValueError, match=r"l\.gguf: fewstep\.text_encoder\.token_ids names \d"):
        loading.load_text_encoders([cut(tmp_path, ids, lambda table: table[:4])])


def nan_scale(tensor):
    blocks, qtype, shape = toys.quantised(tensor, T.Q8_0)
    blocks[0, :2] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    return blocks, qtype, shape


def test_nan_in_the_scale_of_a_bias_an_embedding_and_a_vae_is_named(tmp_path):
    state_dict = toys.mmdit()
    path = str(tmp_path / "n.gguf")
    state_dict[QKV + ".bias"] = (*nan_scale(state_dict[QKV + ".bias"][None])[:2], (384,))
    write_gguf(path, "sd3", {}, state_dict.items())
    with pytest.raises(ValueError, match=rf"n\.gguf: tensor {QKV}\.bias holds NaN"):
        loading.load_diffusion_model(path)

    sizes = {f"fewstep.text_encoder.{k}": v for k, v in toys.CLIP_SIZES.items()}
    table = "text_model.embeddings.token_embedding.weight"
    state_dict = toys.clip_l()
    state_dict[table][49407, 0] = float("inf")
    write_gguf(path, "clip", sizes, (state_dict | {table: state_dict[table].half()}).items())
    clip = loading.load_text_encoders([path])
    with pytest.raises(ValueError, match=rf"n\.gguf: tensor {table} holds NaN"):
        clip.encode_from_tokens(clip.tokenize("a"))

    vae = {"taesd_decoder.1.weight": torch.zeros(64, 16, 3, 3), "decoder.x.weight": torch.eye(32)}
    vae["decoder.x.weight"] = nan_scale(vae["decoder.x.weight"])
    write_gguf(path, "vae", {}, vae.items())
    with pytest.raises(ValueError, match=r"n\.gguf: tensor decoder\.x\.weight holds NaN"):
        loading.load_vae(path)


def test_a_vae_is_whole_or_has_no_encoder(tmp_path):
    path, whole = str(tmp_path / "v.safetensors"), toys.random_state_dict(TAESD(latent_channels=16))
    pixels = torch.zeros(1, 8, 8, 3)
    save_file(whole, path)
    assert loading.load_vae(path).encode(pixels).shape == (1, 16, 1, 1)
    save_file({k: v for k, v in whole.items() if k != "taesd_encoder.3.conv.2.bias"}, path)
    with pytest.raises(ValueError, match=r"v\.safetensors lacks the tensor taesd_encoder\.3\.con"):
        loading.load_vae(path)
    save_file({k: v for k, v in whole.items() if k.startswith("taesd_decoder")}, path)
    vae = loading.load_vae(path)
    assert vae.decode(torch.zeros(1, 16, 1, 1)).isfinite().all()
    with pytest.raises(ValueError, match=r"v\.safetensors holds no encoder"):
        vae.encode(pixels)


def test_a_vae_of_one_byte_floats_is_read_and_one_that_does_not_fit_is_named(tmp_path):
    path, whole = str(tmp_path / "v.safetensors"), toys.random_state_dict(TAESD(latent_channels=16))
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in whole.items()}, path)
    assert loading.load_vae(path).decode(torch.zeros(1, 16, 1, 1)).isfinite().all()
    conv = "taesd_decoder.1.weight"
    for odd in (whole | {conv: torch.zeros(32, 16, 3, 3)}, {conv: torch.zeros(4)}):
        save_file(odd, path)
        with pytest.raises(ValueError, match=r"v\.safetensors is no VAE that this ComfyUI can"):
            loading.load_vae(path)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "download again"),
        (b"GGUF" + bytes(40), "rename it to .gguf"),
        (b"PK\3\4" + bytes(40), "no pickle is ever loaded"),
        ((1 << 20).to_bytes(8, "little") + b'{"a":', "download again"),
    ],
)
@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_safetensors_is_named(tmp_path, loader, content, said):
    (tmp_path / "s.SAFETENSORS").write_bytes(content)
    with pytest.raises(ValueError, match=rf"s\.SAFETENSORS is no whole.*{said}"):
        LOADERS[loader](str(tmp_path / "s.SAFETENSORS"))


def test_floats_in_a_weights_place_take_its_own_type():
    """K-quants too, which gguf-py cannot write."""
    blocks, qtype, shape = toys.random_blocks(torch.zeros(4, 256), T.Q4_K)
    weight = wrap(blocks, qtype, shape)
    wanted = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    patched = weight.requantize_from_float(wanted)
    assert patched.params.qtype == T.Q4_K and patched.shape == shape
    assert (patched.dequantize().float() - wanted).norm() < 0.1 * wanted.norm()


def test_floats_in_place_of_a_type_that_needs_an_importance_are_refused():
    blocks, qtype, shape = toys.random_blocks(torch.zeros(4, 256), T.IQ1_S)
    weight = wrap(blocks, qtype, shape)
    with pytest.raises(ValueError, match=r"IQ1_S .* floats in place, .* needs an importance"):
        weight.requantize_from_float(torch.zeros(4, 256))


@pytest.mark.parametrize("number", [0, 5])
def test_as_many_text_encoders_as_the_host_joins(number):
    with pytest.raises(ValueError, match=f"{number} text encoders: expected one to 4"):
        loading.load_text_encoders(["clip.gguf"] * number)
