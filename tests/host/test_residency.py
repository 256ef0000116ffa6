"""Dequantised weights that stay in memory: the same numbers, within the budget, given back."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as management
import pytest
import torch
from fewstep import run
from fewstep.host import loading, residency
from fewstep.host.layout import is_gguf
from fewstep.tests.host import toys
from fewstep.tests.host.test_cpu import bfloat16, float32  # noqa: F401  fixtures
from fewstep.tests.host.test_loading import sample
from fewstep.tests.host.test_lora import load, lokr, low_rank, module, ways  # noqa: F401  a fixture

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path):
    toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    return str(tmp_path / "m.gguf")


def kept_by(model):
    return model.model.diffusion_model.x_embedder.proj.gguf_residency


@pytest.fixture(params=["small", "float32", "bfloat16"])
def products(request):
    """How small weights are multiplied, and large ones; see test_cpu.py."""
    if request.param != "small":
        request.getfixturevalue(request.param)


@pytest.mark.parametrize("memory", ["auto", "2 GB"])
@pytest.mark.parametrize("make", [None, low_rank, lokr])
def test_draws_the_same_whatever_is_kept(products, path, memory, make):
    def draw(memory):
        model = loading.load_diffusion_model(path, memory)
        patched = load(model, make()) if make else model
        return [sample(patched), sample(model), sample(patched)]

    assert all(map(torch.equal, draw(memory), draw("low")))


def test_what_is_kept_with_loras_in_it_follows_them(path, ways):  # noqa: F811
    def draw(memory):
        model = loading.load_diffusion_model(path, memory)
        if ways == "merged":  # as on a GPU
            type(module(model)).merges = lambda layer, branch, x: branch is not None
        loras = [(low_rank(), 1.0), (low_rank(), 0.5), (low_rank(seed=5), 0.5)]
        models = [model, *(load(model, *lora) for lora in loras), model]
        drawn, merged = [], []
        for patched in models:
            drawn.append(sample(patched))
            merged.append(sum(branch is not None for _, branch in kept_by(model).kept.values()))
        return drawn, merged

    (kept, merged), (low, _) = draw("2 GB"), draw("low")
    assert all(map(torch.equal, kept, low)) and torch.equal(kept[0], kept[4])
    assert len({picture.sum().item() for picture in kept}) == 4
    assert merged == ([0, 1, 1, 1, 0] if ways == "merged" else [0] * 5)


def test_low_keeps_nothing(path):
    model = loading.load_diffusion_model(path)
    sample(model)
    assert not kept_by(model).kept and not kept_by(model).uses


def test_a_budget_is_kept_to_and_goes_to_the_most_used(path):
    model = loading.load_diffusion_model(path, "2 GB")
    sample(model)
    kept = kept_by(model)
    whole, modules = kept.size, list(kept.kept)
    assert whole > 0 and len(modules) > 2
    hot = modules[-1]
    kept.uses[hot] = 1000, kept.uses[hot][1]
    kept.budget = whole // 2
    sample(model)
    assert 0 < kept.size <= whole // 2 and hot in kept.kept
    places = {m: w.data_ptr() for m, (w, _) in kept.kept.items()}
    sample(model)
    assert places == {m: w.data_ptr() for m, (w, _) in kept.kept.items()}  # no coming and going


def test_auto_takes_what_is_free_and_gives_it_back(path, monkeypatch):
    model = loading.load_diffusion_model(path, "auto")
    monkeypatch.setattr(residency, "spare", lambda _: 2**30)
    sample(model)
    kept = kept_by(model)
    assert kept.size > 0
    half = kept.size // 2
    monkeypatch.setattr(residency, "spare", lambda _: -half)  # others want it
    sample(model)
    assert 0 < kept.size <= half + 1
    monkeypatch.setattr(residency, "spare", lambda _: -(2**30))
    sample(model)
    assert kept.size == 0


def test_auto_gives_back_what_the_host_asks_for(path, monkeypatch):
    """As it does before it loads another model."""
    model = loading.load_diffusion_model(path, "auto")
    monkeypatch.setattr(residency, "spare", lambda _: 2**30)
    sample(model)
    kept, free = kept_by(model), 2**30
    before = kept.size
    found = {True: (free, free), False: free}
    monkeypatch.setattr(
        management, "get_free_memory", lambda device, torch_free_too=False: found[torch_free_too]
    )
    management.free_memory(free + model.model_size() // 2, CPU)
    assert 0 < kept.size < before
    management.free_memory(free + 2 * model.model_size(), CPU)
    assert before > 0 and kept.size == 0 and not kept.scratch


def test_auto_keeps_nothing_where_the_host_does_not_say_that_it_takes_memory(path, monkeypatch):
    """Its dynamic VRAM, which this machine has not."""
    monkeypatch.setattr(residency, "spare", lambda _: 2**30)
    for memory, dynamic in (("auto", True), ("auto", False), ("2 GB", True)):
        model = loading.load_diffusion_model(path, memory)
        sample(model)
        kept = kept_by(model)
        assert kept.size > 0
        kept.rest(SimpleNamespace(is_dynamic=lambda dynamic=dynamic: dynamic))
        assert (kept.size == 0) == ((memory, dynamic) == ("auto", True))


def test_what_stays_free(monkeypatch):
    monkeypatch.setattr(management, "get_free_memory", lambda _: 20e9)
    monkeypatch.setattr(management, "get_total_memory", lambda _: 32e9)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 1e9)
    model = SimpleNamespace(load_device=CPU, model_size=lambda: 3e9)
    assert residency.spare(model) == 20e9 - 4e9 - 1e9 - 3e9


def test_is_given_back_when_the_host_asks(path):
    model = loading.load_diffusion_model(path, "2 GB")
    sample(model)
    kept = kept_by(model)
    before = kept.size
    model.partially_unload(CPU, model.model_size() // 2)
    assert kept.size < before
    sample(model)
    management.unload_all_models()
    assert kept.size == 0
    sample(load(model, low_rank()))  # a clone takes over what is loaded
    places = [w.data_ptr() for w, _ in kept.kept.values()]
    sample(model)
    assert places and places == [w.data_ptr() for w, _ in kept.kept.values()]


def test_goes_with_the_model(path):
    model = loading.load_diffusion_model(path, "2 GB")
    sample(model)
    kept = kept_by(model)
    assert kept.kept
    management.unload_all_models()
    del model
    gc.collect()
    assert not kept.kept


def test_bad_choices_are_told(path):
    with pytest.raises(ValueError, match="memory is 'lots': choose low, auto, or a size"):
        loading.load_diffusion_model(path, "lots")


WATCHED = """
import gc, os, sys
import psutil, torch
import fewstep_run
from fewstep.tests import in_process
in_process.prepare()
import comfy.model_management as management
from fewstep.host import loading
from fewstep.tests.host.test_loading import sample
from fewstep.tests.host.test_lora import KEY, load

def say(what):
    gc.collect()
    print(what, psutil.Process().memory_info().rss, flush=True)

torch.set_num_threads(1)
sample(loading.load_diffusion_model(sys.argv[1]), 1)  # what any first run takes
management.unload_all_models()
say("start")
model = loading.load_diffusion_model(sys.argv[2], sys.argv[3])
say("loaded")
sample(model, 1)
say("drawn")
(loaded,) = management.current_loaded_models
loaded.model_unload(model.model_size() // 2)  # as another model needs room
say("asked")
up, down = torch.ones(1536, 4), torch.ones(4, 512)
lora = {KEY + ".lora_up.weight": up, KEY + ".lora_down.weight": down}
sample(load(model, lora, 0.01), 1)
say("again")
management.unload_all_models()
say("unloaded")
del model
say("gone")
"""


def watch(*arguments) -> dict[str, int]:
    """A process's resident bytes, step by step. Freed memory goes back to the system at once."""
    root = str(Path(run.__file__).parent)
    start = f"import sys; sys.path.insert(0, {root!r}); import run; run.load_pack('fewstep')"
    code = WATCHED.replace("import fewstep_run", start)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        | {"MALLOC_MMAP_THRESHOLD_": str(2**16)},
    )
    assert done.returncode == 0, done.stderr
    return {what: int(size) for what, size in map(str.split, done.stdout.splitlines())}


@pytest.mark.skipif(sys.platform != "linux", reason="allocators elsewhere keep what is freed")
def test_memory_as_the_system_sees_it(path, tmp_path):
    large = tmp_path / "large.gguf"
    toys.write(large, "sd3", toys.mmdit(depth=8))
    file, slack = large.stat().st_size, 40 * 2**20
    low, all_kept = watch(path, str(large), "low"), watch(path, str(large), "2 GB")
    for seen in (low, all_kept):  # mapped, not read
        assert seen["loaded"] - seen["start"] < file / 4 + slack
    assert low["drawn"] - low["start"] < 1.05 * file + slack
    unpacked = 3 * file  # at least, of Q8_0 in float32
    assert all_kept["drawn"] - all_kept["start"] > file + 0.8 * unpacked
    assert all_kept["asked"] < all_kept["drawn"] - unpacked / 4
    assert all_kept["unloaded"] - all_kept["start"] < 1.05 * file + slack
    assert max(low["gone"] - low["start"], all_kept["gone"] - all_kept["start"]) < slack


def test_what_is_unpacked_for_one_product_lies_where_the_last_one_did(path):
    model = loading.load_diffusion_model(path)
    sample(model)
    (scratch,) = kept_by(model).scratch.values()
    place, size = scratch.data_ptr(), scratch.nbytes
    sample(model)
    (scratch,) = kept_by(model).scratch.values()
    weights = [p for p in model.model.parameters() if is_gguf(p)]
    assert (scratch.data_ptr(), scratch.nbytes) == (place, size)
    assert size <= 4 * max(p.numel() for p in weights)
    management.unload_all_models()
    assert not kept_by(model).scratch


def test_saving_gives_each_weight_memory_of_its_own(path):
    model = loading.load_diffusion_model(path)
    model.patch_model(CPU)
    saved = [t.to(CPU) for t in model.state_dict_for_saving().values()]
    assert len({t.data_ptr() for t in saved}) == len(saved)
