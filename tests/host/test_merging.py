"""LoRAs added to weights as these are unpacked: when, and that it is the same."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from fewstep.host.layout import dense, wrap
from fewstep.host.ops import gguf_ops
from fewstep.host.side_branch import SideBranch, Term
from fewstep.quant import dequantize, quantize
from fewstep.tests.host.test_loading import sample
from fewstep.tests.host.test_lora import (  # noqa: F401  two are fixtures
    CLOSE,
    COLUMNS,
    CPU,
    ROWS,
    branch_of,
    load,
    low_rank,
    models,
    module,
    normal,
    ways,
)
from fewstep.tests.quant.elsewhere import Elsewhere
from gguf import GGMLQuantizationType as T

GPU = torch.device("mps")  # one that needs no kernels of ours
MERGED = importlib.import_module("fewstep.quant.merged")
TRITON = SimpleNamespace(COMPILED={T.Q8_0}, DTYPES={torch.bfloat16}, MOST=256)


def test_parts_are_merged_where_no_two_share_some_rows(exact, models):  # noqa: F811
    model, _ = models
    layer, given = module(model), {}
    for name, spans in {"apart": [(0, 100), (200, 384)], "across": [(0, 100), (50, 150)]}.items():
        terms = [
            Term(normal(b - a, 4), normal(4, COLUMNS, seed=1), 0.5, slice(a, b), slice(0, COLUMNS))
            for a, b in spans
        ]
        given[name] = SideBranch(terms, (ROWS, COLUMNS))
    assert given["apart"].merges and not given["across"].merges
    narrow = Term(normal(ROWS, 4), normal(4, 64), 0.5, slice(0, ROWS), slice(0, 64))
    assert not SideBranch([narrow], (ROWS, COLUMNS)).merges
    x = normal(7, COLUMNS)
    for held in (layer.weight, dense(layer.weight)):  # a plain one is left as it is
        before = dense(held).clone()
        merged = given["apart"].merged(held, torch.float32)
        beside = given["apart"].add(torch.nn.functional.linear(x, before), x)
        torch.testing.assert_close(torch.nn.functional.linear(x, merged), beside, **CLOSE)
        assert torch.equal(dense(held), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_mixes_no_devices(dtype, monkeypatch):
    """The weight lies on a GPU, a LoRA's factors where they were loaded."""
    up, down = normal(40, 4), normal(4, COLUMNS, seed=1)
    branch = SideBranch([Term(up, down, 0.5, slice(10, 50), slice(0, COLUMNS))], (ROWS, COLUMNS))
    blocks = quantize(normal(ROWS, COLUMNS, seed=2), T.Q8_0)
    truth = dequantize(blocks, T.Q8_0, (ROWS, COLUMNS))
    truth[10:50] += 0.5 * up @ down
    monkeypatch.setattr("fewstep.host.side_branch.is_gguf", lambda weight: True)
    with Elsewhere(GPU):
        there = SimpleNamespace(
            _qdata=blocks.to(GPU), params=SimpleNamespace(qtype=T.Q8_0), device=GPU
        )
        merged = branch.merged(there, dtype)
        assert merged.device == GPU
        merged = merged.cpu()
    torch.testing.assert_close(merged, truth.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_many_vectors_find_loras_in_the_weight_and_few_beside_it(exact, models, monkeypatch):  # noqa: F811
    patched = load(models[0], low_rank())
    patched.patch_model(CPU)
    layer, calls, merged = module(patched), [], SideBranch.merged
    monkeypatch.setattr(SideBranch, "merged", lambda *given: calls.append(0) or merged(*given))
    border = ROWS * COLUMNS // (ROWS + COLUMNS)
    few, many = normal(border, COLUMNS), normal(1, border + 1, COLUMNS)
    with torch.no_grad():
        torch.testing.assert_close(layer(few), layer(many[0, :-1]), **CLOSE)
        assert not calls
        torch.testing.assert_close(layer(many)[0, :-1], layer(many[0, :-1]), **CLOSE)
    assert len(calls) == 1
    layer(many)  # autograd keeps the weight for the backward: not a copy with LoRAs
    assert len(calls) == 1


def test_a_gpus_weight_has_them_if_a_kernel_can_or_it_stays(exact, models, monkeypatch):  # noqa: F811
    patched = load(models[0], low_rank())
    patched.patch_model(CPU)
    layer = module(patched)
    branch, few = branch_of(layer), torch.empty(1, COLUMNS, device="meta")
    with torch.no_grad():
        assert not layer.merges(branch, few)
        asked = []
        with monkeypatch.context() as patch:  # a GPU's kernel, in bfloat16, for Q8_0
            patch.setattr(MERGED, "_kernels", lambda device: asked.append(device) or TRITON)
            assert not layer.merges(branch, few)
            assert layer.merges(branch, few.bfloat16()) and set(asked) == {"meta"}
        layer.gguf_residency.budget = 10**9
        assert layer.merges(branch, few) and not layer.merges(branch, torch.empty(9999, COLUMNS))
        layer.gguf_hooks = object()  # which take turns with the conditionings
        assert not layer.merges(branch, few)
        layer.gguf_hooks = None
        layer.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
        assert not layer.merges(branch, few)  # a plain one would be merged each time


def test_a_weak_lora_is_not_rounded_away_of_what_is_stored_otherwise():
    """A weight of the file's own floats, and one whose rows are not whole blocks."""
    odd, plain = normal(96, 48), normal(96, 48).half()
    blocks = quantize(odd.view(-1, 96), T.Q8_0)
    for held in (plain, wrap(blocks.view(96, -1), T.Q8_0, (96, 48))):
        floats, out = dense(held).float(), torch.empty(96, 48, dtype=torch.bfloat16)
        up, down = normal(96, 4), 2**-8 * normal(4, 48, seed=1)
        branch = SideBranch([Term(up, down, 1.0, slice(0, 96), slice(0, 48))], (96, 48))
        assert branch.merged(held, torch.bfloat16, out) is out
        wanted = up @ down
        moved = out.double() - floats.bfloat16().double()
        assert (moved * wanted).sum() / (wanted * wanted).sum() == pytest.approx(1, abs=0.15)


def test_what_a_type_cannot_hold_is_named(models):  # noqa: F811
    layer = gguf_ops("toy.gguf").Linear(8, 8, bias=False)
    layer.load_state_dict({"weight": torch.full((8, 8), 1e6)})
    with torch.no_grad(), pytest.raises(ValueError, match=r"toy\.gguf: tensor weight holds NaN"):
        layer(torch.ones(1, 8, dtype=torch.float16))


def test_a_lora_that_is_not_finite_is_not_laid_to_the_file(exact, ways, models):  # noqa: F811
    file = {name: factor * torch.nan for name, factor in low_rank().items()}
    assert sample(load(models[0], file)).isnan().any()
