"""The stock hook nodes on quantised weights: as on dequantised ones, and no weight is rewritten."""

import logging

import comfy.hooks
import comfy.model_management as management
import comfy.sample
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras import nodes_hooks as stock
from fewstep.host import hooks, loading
from fewstep.host.layout import is_gguf
from fewstep.tests.host import toys
from fewstep.tests.host.test_lora import (
    CLOSE,
    CPU,
    DENSE,
    KEY,
    ROWS,
    forward,
    load,
    lokr,
    low_rank,
    module,
    normal,
)
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file

DEPTH = 4  # as wide as a super-block
WIDE = "diffusion_model.joint_blocks.1.x_block.mlp.fc1", (1024, 256)


def load_both(path, qtype, depth=2):
    """A GGUF model and the same one dequantised."""
    dense = toys.write(path, "sd3", toys.mmdit(depth), qtype)
    model = loading.load_diffusion_model(str(path))
    return model, comfy.sd.load_diffusion_model_state_dict(dense)


@pytest.fixture
def models(tmp_path):
    return load_both(tmp_path / "m.gguf", T.Q8_0)


@pytest.fixture
def hook(tmp_path, monkeypatch):
    """The node *Create Hook LoRA*, given a LoRA's tensors instead of its file's name."""
    paths = {"loras": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)

    def create(file, strength=1.0, strength_clip=0.0, before=None):
        save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / "l.safetensors")
        node = stock.CreateHookLora()
        return node.create_hook("l.safetensors", strength, strength_clip, before)[0]

    return create


def keyframed(hooks, *frames):
    """(share of the way, strength) …, by the nodes *Create Hook Keyframe*, *Set Hook Keyframes*."""
    group = None
    for start, strength in frames:
        group = stock.CreateHookKeyframe().create_hook_keyframe(strength, start, group)[0]
    return stock.SetHookKeyframes().set_hook_keyframes(hooks, group)[0]


def draw(model, positive=None, negative=None, steps=4, seed=3):
    """With guidance, each conditioning with hooks of its own; `seed` of prompts and noise."""
    g = torch.Generator().manual_seed(seed)
    conds = []
    for held in (positive, negative):
        pooled = {"pooled_output": torch.randn(1, 2048, generator=g)}
        cond = [[torch.randn(1, 77, 4096, generator=g), pooled]]
        conds.append(stock.SetModelHooksOnCond().attach_hook(cond, held)[0] if held else cond)
    noise = torch.randn(1, 16, 8, 8, generator=g)
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(model, noise, steps, 2.0, "euler", "simple", *conds, latent, seed=4)


def blocks(model):
    return {name: p for name, p in model.model.named_parameters() if is_gguf(p)}


def wide_lora():
    key, (rows, columns) = WIDE
    up, down = normal(rows, 4, seed=1), normal(4, columns, seed=2)
    return {f"{key}.lora_up.weight": 5 * up, f"{key}.lora_down.weight": down}


EVERY_KIND = (T.Q8_0, T.Q4_0, T.Q4_K, T.Q6_K, T.IQ4_XS, T.IQ2_XXS, T.IQ1_S)


@pytest.mark.parametrize("qtype", EVERY_KIND, ids=lambda qtype: qtype.name)
def test_equals_the_lora_on_dequantised_weights_and_leaves_the_blocks(exact, tmp_path, hook, qtype):
    model, reference = load_both(tmp_path / "m.gguf", qtype, DEPTH)
    held, plain = hook(wide_lora()), draw(model, steps=2)
    before = {name: (p._qdata.data_ptr(), p._qdata.clone()) for name, p in blocks(model).items()}
    drawn, wanted = draw(model, held, steps=2), draw(reference, held, steps=2)
    torch.testing.assert_close(drawn, wanted, **CLOSE)
    assert (drawn - plain).norm() > 100 * (drawn - wanted).norm()
    after = blocks(model)
    assert len(before) > 10 and before.keys() == after.keys()
    for name, (place, bytes_) in before.items():
        assert after[name]._qdata.data_ptr() == place and torch.equal(after[name]._qdata, bytes_)
    assert torch.equal(draw(model, steps=2), plain)


def test_bfloat16_products_err_no_more_with_a_hook_than_without(models, hook):
    def error(a, b):
        return ((a - b).norm() / b.norm()).item()

    (model, reference), held = models, hook(low_rank())
    without = error(draw(model), draw(reference))
    assert error(draw(model, held), draw(reference, held)) < max(2 * without, 1e-5)


def test_keyframes_change_the_strength_on_the_way(exact, models, hook):
    model, reference = models
    frames = (0.0, 0.25), (0.4, 1.0), (0.8, 0.0)
    changing = keyframed(hook(low_rank()), *frames)
    drawn = draw(model, changing)
    torch.testing.assert_close(drawn, draw(reference, changing), **CLOSE)
    for strength in {s for _, s in frames}:
        constant = draw(model, hook(low_rank(), strength))
        assert not torch.allclose(drawn, constant, atol=1e-3)
    assert torch.equal(draw(model, changing), drawn)  # and from the start again


def test_conditionings_with_hooks_of_their_own_take_turns(exact, models, hook):
    model, reference = models
    first = keyframed(hook(low_rank(seed=1)), (0.0, 1.0), (0.5, 0.5))
    both = hook(low_rank(8, seed=3), -0.5, before=hook(low_rank(seed=5), 2.0))
    for held in ((first, None), (None, first), (first, both)):
        torch.testing.assert_close(draw(model, *held), draw(reference, *held), **CLOSE)


@pytest.mark.parametrize("make", DENSE)
def test_other_adapters(exact, models, hook, make):
    model, reference = models
    held, plain = hook(make()), draw(model)
    drawn = draw(model, held)
    torch.testing.assert_close(drawn, draw(reference, held), **CLOSE)
    assert not torch.allclose(drawn, plain, atol=1e-3)
    assert torch.equal(draw(model), plain) and is_gguf(module(model).weight)


def test_a_bias_is_left_to_the_host(exact, models, hook):
    (model, reference), held = models, hook(low_rank() | {f"{KEY}.diff_b": normal(ROWS)})
    plain = draw(model)
    torch.testing.assert_close(draw(model, held), draw(reference, held), **CLOSE)
    assert torch.equal(draw(model), plain)


def test_a_model_as_lora(exact, models, tmp_path):
    """What the node *Create Hook Model as LoRA* makes of a checkpoint: the way to its weights."""
    model, reference = models
    target = {f"diffusion_model.{k}": v for k, v in toys.mmdit(seed=9).items()}
    held = comfy.hooks.create_hook_model_as_lora(target, None, 0.5, 0.0)
    plain = draw(model)
    torch.testing.assert_close(draw(model, held), draw(reference, held), **CLOSE)
    assert torch.equal(draw(model), plain)


@pytest.mark.parametrize("beneath", [low_rank, lokr], ids=["side branch", "written"])
def test_beside_a_loaders_lora(exact, models, hook, beneath):
    model, reference = (load(m, beneath(), 0.7) for m in models)
    held, plain = hook(low_rank(seed=7), 2.0), draw(model)
    torch.testing.assert_close(draw(model, held), draw(reference, held), **CLOSE)
    assert torch.equal(draw(model), plain)
    assert torch.equal(draw(models[0]), draw(models[0].clone()))


@pytest.mark.parametrize("make", [low_rank, lokr])
@pytest.mark.parametrize("beneath", [low_rank, lokr])
def test_loaded_fully_or_partly_it_is_the_same(exact, models, hook, beneath, make):
    model, reference = (load(m, beneath(), 0.7) for m in models)
    held = hook(make(), 0.5)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)

    def under_hooks(patcher):
        patcher.register_all_hook_patches(held, target, {})
        patcher.apply_hooks(held)
        drawn = forward(patcher)
        patcher.cleanup()
        return drawn, forward(patcher)

    reference.patch_model(CPU)
    truth, without = under_hooks(reference)
    size = model.model_size()
    for memory in (0, 1, size // 2):  # wholly, nothing, a half
        model.patch_model(CPU, lowvram_model_memory=memory)
        drawn, after = under_hooks(model)
        torch.testing.assert_close(drawn, truth, **CLOSE)
        torch.testing.assert_close(after, without, **CLOSE)
        model.detach()


def test_nothing_is_kept_and_nothing_stays_behind(models, hook):
    model, _ = models
    seen = []

    def look(patcher, _hooks):
        seen.append((dict(patcher.hook_backup), dict(patcher.cached_hook_patches)))

    model.add_callback_with_key("on_apply_hooks", "look", look)
    draw(model, hook(low_rank()), hook(lokr()))
    assert len(seen) > 2 and not any(backup or cached for backup, cached in seen)
    layer = module(model)
    assert layer.gguf_hooks is None and layer.branches == () and layer.waiting_patch() is None


def test_a_clone_without_hooks_draws_without(exact, models, hook):
    model, _ = models
    plain, held = draw(model), hook(low_rank())
    clone = model.clone()
    drawn = draw(clone, held)
    assert torch.equal(draw(model), plain)
    assert torch.equal(draw(model, held), drawn)
    assert torch.equal(draw(clone), plain)


def test_the_log_says_it_once(models, hook, caplog):
    (model, _), held = models, hook(low_rank())
    with caplog.at_level(logging.INFO, logger=hooks.__name__):
        draw(model, held)
        draw(model, held)
    (line,) = [r.getMessage() for r in caplog.records if r.name == hooks.__name__]
    assert line == "LoRA hook on 1 weights of SD3, none of them rewritten"


@pytest.mark.parametrize("scheduled", [False, True])
def test_text_encoders_take_hooks(exact, tmp_path, hook, scheduled):
    """The node *Set CLIP Hooks*; scheduled, each keyframe gives a conditioning of its own."""
    width = toys.CLIP_SIZES["hidden_size"]
    sizes = {f"fewstep.text_encoder.{k}": v for k, v in toys.CLIP_SIZES.items()}
    dense = toys.write(tmp_path / "l.gguf", "clip", toys.clip_l(), metadata=sizes)
    clip = loading.load_text_encoders([str(tmp_path / "l.gguf")])
    reference = comfy.sd.load_text_encoder_state_dicts(
        [dense],
        clip_type=comfy.sd.CLIPType.SD3,
        model_options={"model_config": dict(toys.CLIP_SIZES), "dtype": torch.float32},
    )
    layer = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    up, down = 10 * normal(2 * width, 4), 10 * normal(4, width, seed=1)
    file = {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
    held = keyframed(hook(file, 0.0, 1.0), (0.0, 1.0), (0.5, 0.25))

    def encode(clip, held=None):
        if held is not None:
            clip = stock.SetClipHooks().apply_hooks(clip, scheduled, False, held)[0]
        conds = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
        return [cond[0] for cond in conds]

    plain, hooked, wanted = encode(clip), encode(clip, held), encode(reference, held)
    assert len(hooked) == len(wanted) == (2 if scheduled else 1)
    for a, b in zip(hooked, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
        assert (a - plain[0]).norm() > 100 * (a - b).norm()
    assert torch.equal(encode(clip)[0], plain[0])
    management.unload_all_models()
