"""The quantising nodes on a tiny SD3: what is written, what is watched, what is foretold."""

import math
import os
import re

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.cli_args import args
from comfy.weight_adapter.bypass import BypassInjectionManager
from comfy_extras.nodes_model_merging import ModelMergeSimple
from fewstep.flow import find_preset, preset_from_metadata
from fewstep.host import comparing, folders, importance, loading, preflight
from fewstep.nodes.quantizing import (
    FewStepCompare,
    FewStepImportance,
    FewStepInspect,
    FewStepQuantize,
)
from fewstep.quant import GGUFFile, dequantize, quantize
from fewstep.quant.importance import read_importance
from fewstep.tests.host import toys
from fewstep.tests.host.test_loading import QKV, lora, sample, with_lora
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """The host as started with --fp32-unet: no product is rounded to bfloat16."""
    monkeypatch.setattr(args, "fp32_unet", True)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """An output folder of the test's own."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output"


@pytest.fixture
def model():
    """A tiny SD3, unquantised."""
    return comfy.sd.load_diffusion_model_state_dict(toys.mmdit())


def write(model, recipe="F32", prefix="diffusion_models/m", **inputs):
    """-> (the file's path, the report's text, the plot)"""
    name, text, plot = FewStepQuantize.execute(model, recipe, prefix, **inputs).args
    return f"{folder_paths.get_output_directory()}/{name}", text, plot


def floats(path, name=f"{QKV}.weight"):
    file = GGUFFile(path)
    info = file.tensors[name]
    return dequantize(file.blocks(name), info.qtype, info.shape)


# --- FewStep Quantize --------------------------------------------------------------------------


def test_writes_every_weight_and_the_host_loads_it_back(model):
    path, text, plot = write(model)
    again = loading.load_diffusion_model(path)
    assert torch.equal(sample(again), sample(model))
    assert set(GGUFFile(path).tensors) == set(toys.mmdit())
    assert text.startswith("diffusion_models/m-F32_00001_.gguf: Stable Diffusion 3 and 3.5 by F32")
    assert re.match(r".*\n[\d.]+ MB \(source .* bits a weight, relative error ", text), text
    assert "F32" in text and plot.shape == (1, 640, 1200, 3) and 0 <= plot.min() < plot.max() <= 1


@pytest.mark.parametrize("sampled_before", [False, True])
def test_loras_are_baked_as_the_host_patches_them(model, sampled_before):
    patched = with_lora(model, 0.7)
    drawn = sample(patched)
    if not sampled_before:  # the host has patched the weights in place: take that back
        comfy.model_management.unload_all_models()
    path, text, _ = write(patched)
    assert torch.equal(sample(loading.load_diffusion_model(path)), drawn)
    up, down = lora().values()
    expected = toys.mmdit()[f"{QKV}.weight"] + 0.7 * up @ down
    torch.testing.assert_close(floats(path), expected)
    assert "baked in: LoRAs or merges in 1 of " in text
    path, text, _ = write(model)  # and the MODEL without it is as it was
    assert torch.equal(floats(path), toys.mmdit()[f"{QKV}.weight"])
    assert "baked in" not in text


def test_lora_is_baked_into_a_quantised_model(tmp_path):
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    patched = with_lora(loading.load_diffusion_model(str(tmp_path / "m.gguf")))
    path, _, _ = write(patched, "Q8_0")
    up, down = lora().values()
    blocks = quantize(dense[f"{QKV}.weight"] + up @ down, T.Q8_0)
    assert torch.equal(GGUFFile(path).blocks(f"{QKV}.weight"), blocks)
    other = QKV.replace("x_block", "context_block") + ".weight"  # copied as it was
    old, new = GGUFFile(tmp_path / "m.gguf"), GGUFFile(path)
    assert torch.equal(old.blocks(other), new.blocks(other))


def test_other_kinds_of_lora_are_baked_by_the_host(model):
    g = torch.Generator().manual_seed(6)
    small, large = torch.randn(8, 8, generator=g), torch.randn(48, 16, generator=g) * 0.05
    lokr = {f"diffusion_model.{QKV}.lokr_w1": small, f"diffusion_model.{QKV}.lokr_w2": large}
    patched = comfy.sd.load_lora_for_models(model, None, lokr, 0.5, 0)[0]
    path, _, _ = write(patched)
    expected = toys.mmdit()[f"{QKV}.weight"] + 0.5 * torch.kron(small, large)
    torch.testing.assert_close(floats(path), expected)


def test_merges_are_baked(model):
    table = {"pos_embed": toys.mmdit()["pos_embed"]}  # a buffer, which the host does not merge
    other = comfy.sd.load_diffusion_model_state_dict(toys.mmdit(seed=1) | table)
    merged = ModelMergeSimple().merge(model, other, 0.25)[0]
    path, _, _ = write(merged)
    assert torch.equal(sample(loading.load_diffusion_model(path)), sample(merged))


def test_16_bits_stay_of_the_models_kind(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in toys.mmdit().items()}
    options = {"dtype": torch.bfloat16}
    model = comfy.sd.load_diffusion_model_state_dict(half, model_options=options)
    path, _, _ = write(with_lora(model), "flash-16")
    assert GGUFFile(path).tensors[f"{QKV}.weight"].qtype is T.BF16


def test_schedule_is_the_models_own_or_the_one_chosen(model):
    assert preset_from_metadata(GGUFFile(write(model)[0]).metadata) is None
    path, _, _ = write(model, preset="senseflow-sd3.5")
    chosen = preset_from_metadata(GGUFFile(path).metadata)
    assert chosen.name == "senseflow-sd3.5" and chosen.rule == "renoise"
    assert torch.equal(chosen.sigmas(), find_preset("senseflow-sd3.5").sigmas())
    again, _, _ = write(loading.load_diffusion_model(path))
    assert preset_from_metadata(GGUFFile(again).metadata) == chosen


def test_a_budget_goes_before_the_recipe(model):
    path, text, _ = write(model, budget=" 20bpw ")
    assert path.endswith("m-20bpw_00001_.gguf") and "by budget" in text
    file = GGUFFile(path)
    weights = sum(t.numel() for t in toys.mmdit().values())
    assert sum(info.nbytes for info in file.tensors.values()) <= 20 / 8 * weights


def test_effort_reaches_the_search():
    state_dict = toys.mmdit(depth=4)
    model = comfy.sd.load_diffusion_model_state_dict(dict(state_dict))
    path, _, _ = write(model, "Q4_K", effort="high")
    name = "joint_blocks.0.x_block.attn.proj.weight"
    expected = quantize(state_dict[name], T.Q4_K, effort="high")
    assert torch.equal(GGUFFile(path).blocks(name), expected)


def test_files_are_numbered_and_never_replaced(model, output):
    names = [write(model, "Q8_0")[0].rpartition("/")[2] for _ in range(2)]
    assert names == ["m-Q8_0_00001_.gguf", "m-Q8_0_00002_.gguf"]
    assert sorted(p.name for p in (output / "diffusion_models").iterdir()) == names


def test_stop_leaves_nothing_behind(model, output):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        write(model)
    assert list((output / "diffusion_models").iterdir()) == []


def test_progress_reaches_the_nodes_bar(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: seen.append((done, total))
    )
    write(model)
    weights = sum(t.numel() for t in toys.mmdit().values())
    assert seen[-1] == (weights, weights)


def bypassed(model):
    """As the stock bypass LoRA loader leaves it: an injection beside the weights."""
    manager = BypassInjectionManager()
    clone = model.clone()
    clone.set_injections("bypass_lora", manager.create_injections(clone.model))
    return clone


@pytest.mark.parametrize(
    "change, inputs, said",
    [
        (bypassed, {}, "carries bypass_lora, which acts beside the weights"),
        (None, {"recipe": "Q9_K"}, "no recipe or type is called 'Q9_K'.*flash-4.*Q4_K"),
        (None, {"budget": "much"}, "'much' is no budget: give a size, as 1.8GB"),
        (None, {"budget": "1KB"}, "budget of 1 kB is too small: the smallest types take"),
        (None, {"prefix": "../m"}, "outside the output folder"),
        (None, {"prefix": " "}, "names no file"),
        (None, {"prefix": "diffusion_models/"}, "names no file"),
        (None, {"prefix": ".."}, "names no file"),
        (None, {"budget": "1GB/../../m"}, "is no budget"),
        (None, {"importance": "gone.gguf"}, "gone.gguf is not there"),
        (None, {"preset": "gone"}, "Unknown preset 'gone'"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(model, output, change, inputs, said):
    with pytest.raises(Exception, match=said):
        write(change(model) if change else model, **inputs)
    assert not list(output.rglob("*.gguf")) and not list(output.rglob("*.tmp"))


def test_nan_is_named(model):
    bad = toys.mmdit()
    bad[f"{QKV}.weight"][3, 4] = float("nan")
    with pytest.raises(ValueError, match=rf"the MODEL \(SD3\): tensor '{QKV}.weight' holds 1 NaN"):
        write(comfy.sd.load_diffusion_model_state_dict(bad), "Q8_0")


# --- FewStep Importance ------------------------------------------------------------------------


def watched(model, prefix="importance/m"):
    return FewStepImportance.execute(model, prefix).args[0]


def module_of(model, layer=QKV):
    return comfy.utils.get_attr(model.model.diffusion_model, layer)


def test_sums_the_squares_of_what_a_layer_is_given(model):
    inputs = []
    hook = module_of(model).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    plain = sample(model)
    hook.remove()
    assert torch.equal(sample(watched(model)), plain)
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double()
    (name,) = folders.importance_names()
    file = GGUFFile(folders.importance_path(name))
    sums = file.tensor(f"{QKV}.weight.in_sum2")
    assert float(file.tensor(f"{QKV}.weight.counts")) == len(rows)
    torch.testing.assert_close(sums[0].double(), rows.square().sum(0), rtol=1e-5, atol=0)
    mean = read_importance(folders.importance_path(name))[f"{QKV}.weight"]
    torch.testing.assert_close(mean.double(), rows.square().mean(0), rtol=1e-5, atol=0)


def test_each_sampling_adds_to_one_file_and_a_new_node_begins_another(model):
    first = watched(model)
    sample(first)
    once = GGUFFile(folders.importance_path("m_00001_.gguf")).tensor(f"{QKV}.weight.counts")
    once = float(once)
    sample(first.clone())  # LoRA nodes and the like clone it
    file = GGUFFile(folders.importance_path("m_00001_.gguf"))
    assert float(file.tensor(f"{QKV}.weight.counts")) == 2 * once
    assert file.metadata["imatrix.chunk_count"] == 2
    sample(watched(model))
    assert folders.importance_names() == ["m_00001_.gguf", "m_00002_.gguf"]


def test_nothing_hangs_on_the_layers_afterwards(model):
    first = watched(model)
    sample(first)
    assert not any(module._forward_pre_hooks for module in first.model.modules())
    sample(model)  # shares the layers, but is not watched
    assert folders.importance_names() == ["m_00001_.gguf"]
    (name,) = folders.importance_names()
    assert GGUFFile(folders.importance_path(name)).metadata["imatrix.chunk_count"] == 1


def test_a_sampling_that_fails_adds_nothing(model, output):
    first = watched(model)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(first)
    assert not any(module._forward_pre_hooks for module in first.model.modules())
    bad = importance.Watcher("importance/m")
    seen = importance.Seen(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match=r"inputs of a\.weight were NaN"):
        bad.add({"a.weight": seen}, "SD3")
    assert not list(output.rglob("*.gguf"))


def test_a_device_without_float64_sums_in_float32(monkeypatch):
    """Intel's GPUs, Apple's, and those behind DirectML, as the host knows them."""
    monkeypatch.setattr(importance, "supports_fp64", lambda _device: False)
    network, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with importance.watching(network) as sums:
        network[0](x)
    assert sums["0.weight"].squares.dtype == torch.float32
    assert torch.equal(sums["0.weight"].seen().squares, x[0].double().square())


def test_inputs_are_counted_however_a_layer_is_called():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with importance.watching(network) as sums:
        network[0](x)
        network[0](input=torch.stack([x, x]))
    seen = sums["0.weight"].seen()
    torch.testing.assert_close(seen.squares, 3 * x.double().square(), rtol=1e-6, atol=0)
    assert seen.tokens == 3


def test_importance_of_a_quantised_model_fits_its_conversion(tmp_path):
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    sample(watched(model))
    before = FewStepQuantize.fingerprint_inputs(importance="m_00001_.gguf")
    path, _, _ = write(model, "Q4_0", importance="m_00001_.gguf")
    weights = read_importance(folders.importance_path("m_00001_.gguf"))[f"{QKV}.weight"]
    expected = quantize(dense[f"{QKV}.weight"], T.Q4_0, weights)
    assert torch.equal(GGUFFile(path).blocks(f"{QKV}.weight"), expected)
    assert FewStepQuantize.fingerprint_inputs(importance="m_00001_.gguf") == before


def test_importance_of_another_model_is_refused(model, output):
    other = comfy.sd.load_diffusion_model_state_dict(toys.mmdit(depth=3))
    sample(watched(other))
    with pytest.raises(ValueError, match="has rows of 128, the importance file 192"):
        write(model, importance="m_00001_.gguf")


# --- FewStep Inspect ---------------------------------------------------------------------------


def save(path, state_dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, path)
    return str(path)


def test_memory_is_what_the_loaded_model_takes(tmp_path):
    toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    half = {name: tensor.bfloat16() for name, tensor in toys.mmdit().items()}
    for path in (str(tmp_path / "m.gguf"), save(tmp_path / "m.safetensors", half)):
        memory = preflight.model_memory(path, *preflight.files.read(path), (256, 128, 2))
        model = loading.load_diffusion_model(path)
        assert memory.weights == model.model_size(), path
        assert memory.working == int(model.model.memory_required((2, 16, 16, 32)))
        assert memory.device == model.load_device
    largest = max(t.numel() for n, t in toys.mmdit().items() if t.ndim == 2)
    path = str(tmp_path / "m.gguf")
    memory = preflight.model_memory(path, *preflight.files.read(path), (256, 128, 2))
    assert memory.unpacked == largest * 4  # this host computes in float32 on a CPU


def test_report_names_types_schedule_memory_and_fields():
    text = FewStepInspect.execute("diffusion_models/fewstep-demo.gguf", 128, 128).args[0]
    head = r"fewstep-demo\.gguf: diffusion model, sd3\n(\S+) MB, \d\.\d\d bits a weight\n"
    size = os.path.getsize(folders.model_path("diffusion_models", "fewstep-demo.gguf"))
    assert float(re.match(head, text)[1]) == pytest.approx(size / 1e6, rel=0.01)
    assert max(map(len, text.partition("\n\ngeneral.")[0].split("\n"))) <= 74  # none is cut off
    for part in ("Q8_0", "4 steps, euler, CFG 1, 1 0.9 0.75", "memory for 128 x 128", "fits: ",
                 "general.license"):  # fmt: skip
        assert part in text, part
    text = FewStepInspect.execute("vae/fewstep-demo-vae.gguf", 128, 128).args[0]
    assert ": VAE, " in text and "working memory" in text
    text = FewStepInspect.execute("text_encoders/fewstep-demo-clip-l.gguf", 128, 128).args[0]
    assert ": text encoder, clip" in text and "working" not in text


@pytest.mark.parametrize(
    "device, weights, working, said",
    [
        ("cuda:0", 5, 2, "fits: 8 B of 10 B are free on cuda:0"),
        ("cuda:0", 7, 2, "fits once other models are unloaded: 8 B of 10 B"),
        ("cuda:0", 12, 2, "fits in part: 4 B of its weights stay in main memory"),
        ("cuda:0", 1, 12, "does not fit: even without weights 2 B too much"),
        ("cpu", 12, 2, "does not fit: 4 B too much.*a smaller type"),
    ],
)
def test_verdicts(device, weights, working, said):
    memory = preflight.Memory(torch.device(device), weights, 0, working)
    assert re.match(said, memory.verdict(8, 10))


def test_bad_files_are_named(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ValueError, match=r"cut\.gguf.*download"):
        preflight.preflight(str(tmp_path / "cut.gguf"), 64, 64)
    path = save(tmp_path / "odd.safetensors", {"a.weight": torch.ones(4, 4)})
    with pytest.raises(ValueError, match=r"odd\.safetensors.*does not know"):
        preflight.preflight(path, 64, 64)


# --- FewStep Compare ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae():
    return loading.load_vae(folders.model_path("vae", "fewstep-demo-vae.gguf"))


def latents(count=2, side=8):
    return torch.randn(count, 16, side, side, generator=torch.Generator().manual_seed(0))


def test_pictures_side_by_side_and_how_close(vae):
    original = latents()
    other = original.clone()
    other[1] += 0.1
    image, text = FewStepCompare.execute({"samples": original}, {"samples": other}, vae).args
    assert image.shape == (2, 64, 128, 3) and image.min() >= 0 and image.max() <= 1
    left, right = image.chunk(2, dim=2)
    assert torch.equal(left[0], right[0]) and not torch.equal(left[1], right[1])
    expected = 20 * torch.log10((original[1].max() - original[1].min()) / 0.1)
    decoded = -10 * torch.log10((left[1] - right[1]).square().mean())
    first, second, means, _ = text.splitlines()
    assert first == "picture 1: latents inf dB, decoded inf dB"
    assert second == f"picture 2: latents {expected:.1f} dB, decoded {decoded:.1f} dB"
    assert means.startswith("mean: latents inf dB")


def test_latents_of_different_sizes_are_refused(vae):
    with pytest.raises(ValueError, match=r"different shapes.*same size and number"):
        FewStepCompare.execute({"samples": latents()}, {"samples": latents(1)}, vae)


@pytest.mark.parametrize(
    "first, second, said",
    [(0.0, 1.0, "-inf"), (1.0, math.inf, "nan"), (math.nan, 1.0, "nan"), (0.0, 0.0, "inf")],
)
def test_latents_without_a_range_are_told(vae, first, second, said):
    """Black pictures, and latents of nothing, are a result too."""
    samples = latents(1)
    given = [{"samples": samples * factor} for factor in (first, second)]
    assert f"picture 1: latents {said} dB" in FewStepCompare.execute(*given, vae).args[1]


def test_coarser_types_are_further_off(tmp_path, vae):
    """From the same noise through the host: the fewer bits, the lower the PSNR."""
    model = comfy.sd.load_diffusion_model_state_dict(toys.mmdit(depth=4))
    original = {"samples": sample(model)}
    found = []
    for recipe in ("flash-16", "flash-8", "Q5_0", "Q4_0"):
        path, _, _ = write(model, recipe)
        other = {"samples": sample(loading.load_diffusion_model(path))}
        found.append(comparing.compare(original, other, vae))
    for values in ([each.latents[0] for each in found], [each.pictures[0] for each in found]):
        assert sorted(values, reverse=True) == values and len(set(values)) == len(values)
