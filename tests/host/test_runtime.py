"""Weights turned while loading into the host's own formats, by its plain back-end on the CPU."""

import logging
from dataclasses import replace

import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_kitchen.backends.eager import quantization as eager
from fewstep.host import loading, runtime
from fewstep.host.layout import wrap
from fewstep.host.ops import gguf_ops
from fewstep.host.quantizing import quantize_model
from fewstep.quant import GGUFFile, dequantize, numba_int8
from fewstep.quant.sources import open_source
from fewstep.tests.host import toys
from fewstep.tests.host.test_loading import QKV, lora, sample, weight
from gguf import GGMLQuantizationType as T

CPU = torch.device("cpu")
# A rounding to n bits of what comes with a scale for each row or block, of weights and of inputs:
# what the formats reach on normally distributed numbers, with room.
ERRORS = {"int8": 0.015, "fp8": 0.05, "mxfp8": 0.05, "nvfp4": 0.2}
EVERY_FORMAT = pytest.mark.parametrize("name", runtime.FORMATS)
# torch multiplies mxfp8 on no CPU ("CPU does not support swizzle"), so the host does not either.
MULTIPLIED = pytest.mark.parametrize("name", [name for name in runtime.FORMATS if name != "mxfp8"])


@pytest.fixture
def everywhere(monkeypatch):
    """As on a machine that has every format; this one computes the same, slowly."""
    for name, row in list(runtime.FORMATS.items()):
        there = replace(row, here=lambda device: True)
        monkeypatch.setitem(runtime.FORMATS, name, there)


def layer(name, rows=64, columns=512):
    """A linear layer of Q8_0 turned into a format; its exact weight and bias."""
    turning, _ = runtime.choose(name, CPU)
    linear = gguf_ops("toy", runtime=turning).Linear(columns, rows)
    blocks, _, shape = toys.random_blocks(torch.empty(rows, columns), T.Q8_0)
    bias = torch.randn(rows)
    linear.load_state_dict({"weight": wrap(blocks, T.Q8_0, shape), "bias": bias})
    return linear, dequantize(blocks, T.Q8_0, shape), bias, turning


def relative_error(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@MULTIPLIED
@pytest.mark.parametrize("tokens", [1, 77])
def test_products_are_within_the_formats_error(everywhere, name, tokens):
    linear, weight, bias, _ = layer(name)
    x = torch.randn(2, tokens, 512)
    truth = torch.nn.functional.linear(x, weight, bias)
    error = relative_error(linear(x), truth)
    assert 1e-4 < error < ERRORS[name]


@EVERY_FORMAT
def test_weights_are_within_the_formats_error_which_is_told(everywhere, name):
    linear, weight, _, turning = layer(name)
    assert linear.weight._layout_cls == runtime.FORMATS[name].layout
    error = relative_error(linear.weight.dequantize(), weight)
    assert 1e-4 < error < ERRORS[name]
    # what is kept passes for bfloat16, and is rounded to it once more
    assert turning.errors.relative == pytest.approx(error, rel=0.05)
    assert str(turning).startswith(f"runtime {name}: 1 weights turned, relative error 0.")


@pytest.mark.parametrize("columns", [512, 192, 48, 40], ids=lambda n: f"{n} columns")
@pytest.mark.parametrize("numba", [True, False], ids=["numba", "host"])
def test_int8_equals_the_hosts_own_product(everywhere, monkeypatch, columns, numba):
    """Rotated in groups of 256, 64 or 16, or not at all."""
    if not numba:
        monkeypatch.setattr(runtime, "_int8_kernels", lambda: None)
    weight, x, bias = torch.randn(24, columns), torch.randn(9, columns), torch.randn(24)
    x[:, 3] *= 50  # an outlier, as activations have
    turning, _ = runtime.choose("int8", CPU)
    turned = QuantizedTensor.from_float(
        weight, runtime.FORMATS["int8"].layout, **turning.format.options(columns)
    )
    group = turned.params.convrot_groupsize if turned.params.convrot else 0
    assert group == {512: 256, 192: 64, 48: 16, 40: 0}[columns]
    theirs = eager.int8_linear(
        x, turned._qdata, turned.params.scale, bias, torch.float32, bool(group), group or 256
    )
    ours = turning.multiply(x, turned, bias)
    # an input that lies between two codes may be rounded the other way
    assert relative_error(ours, theirs) < 2e-3


def test_rotation_keeps_outliers_from_costing_the_others():
    x, weight = torch.randn(32, 512), torch.randn(16, 512)
    x[:, 3] *= 100
    errors = {}
    for rotated in (False, True):
        if rotated:
            q, scale = eager.quantize_int8_convrot_weight(weight, 256)
        else:
            q, scale = eager.quantize_int8_rowwise(weight)
        made = numba_int8.linear(x, q, scale.reshape(-1), None, rotated)
        errors[rotated] = relative_error(made, x @ weight.T)
    assert errors[True] < errors[False] / 4


@pytest.fixture
def path(tmp_path):
    toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    return str(tmp_path / "m.gguf")


def turned(model):
    layouts = {row.layout for row in runtime.FORMATS.values()}
    return [p for p in model.model.parameters() if getattr(p, "_layout_cls", None) in layouts]


@MULTIPLIED
def test_a_model_draws_nearly_the_same(everywhere, exact, path, name, caplog):
    with caplog.at_level(logging.INFO):
        model = loading.load_diffusion_model(path, runtime=name)
    assert f"runtime {name}: {len(turned(model))} weights turned" in caplog.text
    truth = sample(loading.load_diffusion_model(path))
    assert 0 < relative_error(sample(model), truth) < ERRORS[name]
    again = model.clone(disable_dynamic=True) if model.is_dynamic() else model.clone()
    assert torch.equal(sample(again), sample(model))


def test_a_lora_stays_beside_the_weight(everywhere, exact, path):
    model, plain = (loading.load_diffusion_model(path, runtime=r) for r in ("int8", "exact"))
    patched, reference = (
        comfy.sd.load_lora_for_models(m, None, lora(), 20.0, 0)[0] for m in (model, plain)
    )
    without = relative_error(sample(model), sample(plain))
    assert relative_error(sample(patched), sample(reference)) < 2 * without
    assert relative_error(sample(patched), sample(model)) > 10 * without
    assert weight(patched)._layout_cls == runtime.FORMATS["int8"].layout and not patched.backup


@MULTIPLIED
def test_a_dense_patch_is_added_to_the_turned_weight(everywhere, exact, path, name):
    file = {f"diffusion_model.{QKV}.diff": 0.1 * torch.randn(384, 128)}
    model, plain = (loading.load_diffusion_model(path, runtime=r) for r in (name, "exact"))
    patched, reference = (
        comfy.sd.load_lora_for_models(m, None, dict(file), 1.0, 0)[0] for m in (model, plain)
    )
    before = sample(model)
    assert relative_error(sample(patched), sample(reference)) < 2 * ERRORS[name]
    assert torch.equal(sample(model), before)  # and taken away again


def test_what_is_turned_can_be_written_as_gguf_again(everywhere, path, tmp_path):
    model = loading.load_diffusion_model(path, runtime="int8")
    quantize_model(model, tmp_path / "again.gguf", "Q8_0")
    written = open_source(str(tmp_path / "again.gguf")).tensors[QKV + ".weight"]
    first, again = (t.read(0, t.rows) for t in (open_source(path).tensors[written.name], written))
    assert 0 < relative_error(again, first) < ERRORS["int8"]


def test_nan_is_named_while_loading(everywhere, tmp_path):
    state_dict = toys.mmdit()
    toys.write(tmp_path / "m.gguf", "sd3", state_dict)
    file = GGUFFile(tmp_path / "m.gguf")
    info = file.tensors[QKV + ".weight"]
    with open(tmp_path / "m.gguf", "rb+") as bytes_:
        bytes_.seek(info.offset)
        bytes_.write(b"\xff\xff")  # a scale
    with pytest.raises(ValueError, match=rf"m\.gguf: tensor .*{QKV}\.weight holds NaN"):
        loading.load_diffusion_model(str(tmp_path / "m.gguf"), runtime="int8")


def test_an_unknown_runtime_is_refused_with_the_list(path):
    with pytest.raises(ValueError, match="'int4' is unknown: take one of exact, int8, fp8"):
        loading.load_diffusion_model(path, runtime="int4")


@EVERY_FORMAT
def test_where_a_format_is_missing_weights_stay_exact(monkeypatch, exact, path, caplog, name):
    row = runtime.FORMATS[name]
    monkeypatch.setitem(runtime.FORMATS, name, replace(row, here=lambda device: False))
    with caplog.at_level(logging.WARNING):
        model = loading.load_diffusion_model(path, runtime=name)
    assert f"m.gguf: runtime '{name}' needs {row.needs}" in caplog.text
    assert torch.equal(sample(model), sample(loading.load_diffusion_model(path)))
