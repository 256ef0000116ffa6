"""Stock LoRA loaders on GGUF models: side branches equal to patched weights, however loaded."""

import logging

import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from fewstep.host import loading, lora
from fewstep.host.layout import is_gguf
from fewstep.host.side_branch import SideBranch, side_branch
from fewstep.tests.host import toys
from fewstep.tests.host.test_cpu import float32  # noqa: F401  a fixture
from fewstep.tests.host.test_loading import QKV, sample, weight

CPU = torch.device("cpu")
ROWS, COLUMNS = 384, 128  # of QKV
KEY = f"diffusion_model.{QKV}"
# A side branch sums the same products in another order, in float32.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture
def models(tmp_path):
    """A GGUF model and the same one dequantised."""
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    return model, comfy.sd.load_diffusion_model_state_dict(dense)


@pytest.fixture(params=["beside", "merged"])
def ways(request, monkeypatch):
    """How LoRAs meet all products: added to them, or to the weights, as for many vectors."""
    merged = request.param == "merged"
    monkeypatch.setattr(SideBranch, "is_less_merged", lambda branch, vectors: merged)
    return request.param


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def low_rank(rank=4, seed=0, alpha=None, layer=KEY):
    up, down = 5 * normal(ROWS, rank, seed=seed), normal(rank, COLUMNS, seed=seed + 1)
    file = {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
    return file if alpha is None else file | {f"{layer}.alpha": torch.tensor(alpha)}


def load(model, file, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, dict(file), strength, 0)[0]


def module(model):
    return comfy.utils.get_attr(model.model.diffusion_model, QKV)


def branch_of(layer):
    return layer.side_branch(layer.waiting_patch())


def test_equals_the_lora_on_the_dequantised_model(exact, ways, models):
    model, reference = models
    plain = sample(model)
    patched = load(model, low_rank())
    drawn = sample(patched)
    torch.testing.assert_close(drawn, sample(load(reference, low_rank())), **CLOSE)
    assert not torch.allclose(drawn, plain, atol=1e-2)
    assert is_gguf(weight(model)) and not model.backup  # nothing was written


def test_equals_it_where_large_weights_are_multiplied_packed(float32, models):  # noqa: F811
    model, reference = models
    drawn = sample(load(model, low_rank()))
    torch.testing.assert_close(drawn, sample(load(reference, low_rank())), **CLOSE)


def test_bfloat16_products_err_no_more_with_a_lora_than_without(models):
    def error(a, b):
        return ((a - b).norm() / b.norm()).item()

    model, reference = models
    without = error(sample(model), sample(reference))
    assert error(sample(load(model, low_rank())), sample(load(reference, low_rank()))) < max(
        2 * without, 1e-5
    )


def test_strength_and_removal_take_effect_at_once_and_leave_the_weights_alone(ways, models):
    model, _ = models
    before = [sample(model), sample(load(model, low_rank(), 0.5)), sample(load(model, low_rank()))]
    places = {name: p.data_ptr() for name, p in model.model.named_parameters()}
    after = [sample(load(model, low_rank())), sample(load(model, low_rank(), 0.5)), sample(model)]
    assert all(torch.equal(a, b) for a, b in zip(before, reversed(after), strict=True))
    assert not torch.equal(before[0], before[1]) and not torch.equal(before[1], before[2])
    assert places == {name: p.data_ptr() for name, p in model.model.named_parameters()}


def test_ranks_of_several_are_joined_and_take_their_own_size(exact, ways, models):
    model, reference = models
    files = [low_rank(4, 0), low_rank(16, 2, alpha=8.0), low_rank(8, 4)]
    for strength, file in zip((1.0, -0.5, 0.25), files, strict=True):
        model, reference = load(model, file, strength), load(reference, file, strength)
    torch.testing.assert_close(sample(model), sample(reference), **CLOSE)
    branch = branch_of(module(model))
    (joined,) = branch.parts
    assert branch.rank == 28 and branch.elements == 28 * (ROWS + COLUMNS)
    assert joined[2].shape == (28, ROWS) and joined[3].shape == (COLUMNS, 28)


def test_a_lora_on_a_part_of_the_weight(exact, ways, models):
    """As LoRAs trained on separate q, k and v are: the host's patch names the rows."""
    model, reference = (m.clone() for m in models)
    third = ROWS // 3
    for index in (0, 2):
        up, down = normal(third, 4, seed=index), normal(4, COLUMNS, seed=index + 1)
        adapter = LoRAAdapter(set(), (up, down, None, None, None, None))
        part = (KEY + ".weight", (0, index * third, third))
        for patcher in (model, reference):
            patcher.add_patches({part: adapter}, 0.7)
    torch.testing.assert_close(sample(model), sample(reference), **CLOSE)
    assert branch_of(module(model)).rank == 8


def lokr():
    w1, w2 = normal(8, 8), normal(ROWS // 8, COLUMNS // 8, seed=1)
    return {f"{KEY}.lokr_w1": w1, f"{KEY}.lokr_w2": w2}


def loha():
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((ROWS, 4), (4, COLUMNS), (ROWS, 4), (4, COLUMNS))
    pairs = enumerate(zip(names, shapes, strict=True))
    return {f"{KEY}.{name}": normal(*shape, seed=i) * 3 for i, (name, shape) in pairs}


def oft():
    skew = normal(16, ROWS // 16, ROWS // 16)
    return {f"{KEY}.oft_blocks": skew - skew.mT, f"{KEY}.alpha": torch.tensor(1.0)}


def dora():
    return low_rank() | {f"{KEY}.dora_scale": normal(ROWS, 1) + 1}


def difference():
    return {f"{KEY}.diff": normal(ROWS, COLUMNS)}


def boft():
    return {f"{KEY}.oft_blocks": normal(2, ROWS // 8, 8, 8), f"{KEY}.alpha": torch.tensor(1.0)}


def glora():
    shapes = {"a1": (COLUMNS, 4), "a2": (4, COLUMNS), "b1": (ROWS, 4), "b2": (4, COLUMNS)}
    return {f"{KEY}.{n}.weight": normal(*s, seed=i) * 3 for i, (n, s) in enumerate(shapes.items())}


def replaced():
    return {f"{KEY}.set_weight": normal(ROWS, COLUMNS)}


def reshaped():
    """As LoRAs do that widen a layer; here to the size that it has."""
    return low_rank() | {f"{KEY}.reshape_weight": torch.tensor([ROWS, COLUMNS])}


DENSE = [lokr, loha, oft, boft, glora, dora, difference, replaced, reshaped]


@pytest.mark.parametrize("make", DENSE)
def test_other_adapters_are_added_to_the_weight(exact, models, make):
    model, reference = models
    plain = sample(model)
    patched = load(model, make())
    drawn = sample(patched)
    assert torch.equal(drawn, sample(load(reference, make())))
    assert not torch.equal(drawn, plain)
    assert branch_of(module(model)) is None and KEY + ".weight" in patched.backup
    half = sample(load(model, make(), 0.5))
    assert torch.equal(half, sample(load(reference, make(), 0.5)))
    assert make is replaced or not torch.equal(half, drawn)  # what is set has no strength
    assert torch.equal(sample(model), plain)
    assert is_gguf(weight(model))


def test_a_lora_that_widens_a_layer(exact, models):
    """As those for FLUX.1's tools do: the layer then takes more inputs."""
    wide = COLUMNS + 32
    up, down = normal(ROWS, 4), normal(4, wide, seed=1)
    file = {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down}
    file[f"{KEY}.reshape_weight"] = torch.tensor([ROWS, wide])
    model, _ = models
    layer, x = module(model), normal(3, wide, seed=2)
    padded = torch.nn.functional.pad(weight(model).to(torch.float32).dequantize(), (0, 32))
    truth = torch.nn.functional.linear(x, padded + up @ down, layer.bias)
    patched = load(model, file)
    for memory in (0, 1):  # wholly, or kept offloaded
        patched.patch_model(CPU, lowvram_model_memory=memory)
        torch.testing.assert_close(layer(x), truth, **CLOSE)
        patched.detach()
    assert is_gguf(weight(model)) and weight(model).shape == (ROWS, COLUMNS)


def test_mixed_with_a_dense_one_on_the_same_weight_all_go_the_dense_way(exact, models):
    model, reference = models
    for file in (low_rank(), lokr()):
        model, reference = load(model, file), load(reference, file)
    assert torch.equal(sample(model), sample(reference))


def test_bias_beside_a_side_branch(exact, ways, models):
    model, reference = models
    plain = sample(model)
    file = low_rank() | {f"{KEY}.diff_b": normal(ROWS)}
    drawn = sample(load(model, file))
    torch.testing.assert_close(drawn, sample(load(reference, file)), **CLOSE)
    assert is_gguf(weight(model)) and branch_of(module(model)) is not None
    assert torch.equal(sample(model), plain)


def forward(patcher):
    """One pass of the network as it is loaded now: sampling would load it fully."""
    options = {"context": normal(1, 77, 4096), "y": normal(1, 2048)}
    with torch.inference_mode():
        return patcher.model.diffusion_model(normal(1, 16, 8, 8), torch.ones(1) * 500, **options)


@pytest.mark.parametrize("make", [low_rank, *DENSE])
def test_loaded_fully_or_partly_and_in_any_order_it_is_the_same(exact, ways, models, make):
    patched, reference = (load(m, make() | {f"{KEY}.diff_b": normal(ROWS)}) for m in models)
    reference.patch_model(CPU)
    truth, size = forward(reference), patched.model_size()
    patched.patch_model(CPU)
    fully = forward(patched)
    patched.partially_unload(CPU, size)
    unloaded = forward(patched)
    patched.partially_load(CPU, size // 2)
    half = forward(patched)
    patched.partially_load(CPU, 2 * size)
    again = forward(patched)
    patched.detach()
    patched.patch_model(CPU, lowvram_model_memory=1)
    from_the_start = forward(patched)
    patched.detach()
    for got in (fully, unloaded, half, again, from_the_start):
        torch.testing.assert_close(got, truth, **CLOSE)
    patched.model.diffusion_model.eval()
    assert module(patched).waiting_patch() is None  # and nothing of it stays behind
    assert is_gguf(weight(patched))


def test_dynamic_vrams_patch_is_a_side_branch_too(exact, ways, models):
    """What the host's dynamic VRAM does on a GPU: it sets `weight_lowvram_function`."""
    model, _ = models
    patched, layer, x = load(model, low_rank()), module(model), torch.randn(2, COLUMNS)
    plain = layer(x)
    patch = comfy.model_patcher.LowVramPatch(KEY + ".weight", patched.patches)
    layer.weight_lowvram_function = patch
    up, down = low_rank().values()
    assert layer.weight_lowvram_function is None  # the host must not requantise
    assert branch_of(layer).rank == 4
    torch.testing.assert_close(layer(x), plain + x @ down.T @ up.T, rtol=1e-4, atol=1e-4)
    layer.weight_lowvram_function = None
    assert torch.equal(layer(x), plain)
    assert layer.branches  # the same LoRA may come back
    lora.HandOver()(model, CPU)
    assert not layer.branches


def test_text_encoders_take_loras_beside_their_weights(exact, tmp_path):
    sizes = {f"fewstep.text_encoder.{k}": v for k, v in toys.CLIP_SIZES.items()}
    toys.write(tmp_path / "l.gguf", "clip", toys.clip_l(), metadata=sizes)
    clip = loading.load_text_encoders([str(tmp_path / "l.gguf")])
    width = toys.CLIP_SIZES["hidden_size"]
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    up, down = normal(width, 4), normal(4, width, seed=1)
    file = {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
    patched = comfy.sd.load_lora_for_models(None, clip, file, 0, 1.0)[1]
    tokens = clip.tokenize("a red circle")
    plain, drawn = (c.encode_from_tokens(tokens) for c in (clip, patched))
    assert not torch.equal(plain, drawn)
    path = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    projection = comfy.utils.get_attr(clip.cond_stage_model, path)
    assert branch_of(projection).rank == 4
    assert torch.equal(clip.encode_from_tokens(tokens), plain)


def test_log_says_which_weights_and_how(models, caplog):
    model, _ = models
    patched = load(model, low_rank(alpha=2.0) | {f"{KEY}.diff_b": normal(ROWS)})
    with caplog.at_level(logging.INFO, logger=lora.__name__):
        sample(patched, 1)
        sample(patched, 1)
    (line,) = [r.getMessage() for r in caplog.records if r.name == lora.__name__]
    assert "LoRA on 2 weights of SD3: 1 as side branches of rank 4;" in line
    assert f"1 added to the weights: {KEY}.bias" in line


def test_what_does_not_fit_is_left_to_the_host_to_name():
    adapter = LoRAAdapter(set(), (normal(5, 2), normal(2, 7), None, None, None, None))
    assert side_branch([(1.0, adapter, 1.0, None, None)], (5, 8)) is None
    assert side_branch([(1.0, adapter, 1.0, None, None)], (5, 7)).rank == 2
    assert side_branch([(1.0, adapter, 0.5, None, None)], (5, 7)) is None
    flat = LoRAAdapter(set(), (normal(5), normal(1, 7), None, None, None, None))
    assert side_branch([(1.0, flat, 1.0, None, None)], (5, 7)) is None


def test_a_misfit_is_taken_away_in_inference_mode_from_a_model_loaded_outside_it(exact, models):
    model, _ = models
    misfit = low_rank() | {f"{KEY}.lora_up.weight": normal(ROWS + 1, 4)}
    with torch.inference_mode():
        plain = sample(model)
        sample(load(model, misfit))
        assert torch.equal(sample(model), plain) and is_gguf(weight(model))
