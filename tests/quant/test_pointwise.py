"""GELU and RMS norm of the compiled kernels against float64, and what they leave to torch."""

import importlib

import pytest
import torch
from fewstep.quant import gelu, pointwise, rms_norm
from torch.nn import functional

pytest.importorskip("fewstep.quant.numba_pointwise")


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setattr(pointwise, "_LEAST", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Marked(torch.Tensor):
    """Of a type of its own."""


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# As networks give them: whole; a third of a row; heads before tokens; beginning off a line.
LAYOUTS = {
    "whole": normal(2, 37, 96),
    "part": normal(2, 37, 3, 4, 64)[:, :, 1],
    "turned": normal(2, 37, 4, 64).transpose(1, 2),
    "off": normal(5 * 32 + 1)[1:].view(5, 32),
    "large": normal(700, 2048),  # its result goes past the cache
}


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
def test_gelu_errs_as_torchs(x):
    got, truth = gelu(3 * x), functional.gelu(3 * x.double(), approximate="tanh")
    by_torch = (functional.gelu(3 * x, approximate="tanh") - truth).abs().max()
    assert got.shape == x.shape and got.is_contiguous()
    assert (got - truth).abs().max() <= 1.5 * by_torch


def test_gelu_of_every_size_and_of_what_is_no_number():
    sizes = torch.tensor([0.0, 1e-40, 1e-20, 1.0, 5.0, 8.0, 9.5, 20.0, 1e10, 1e20, 3e38])
    x = torch.cat((sizes, -sizes, torch.tensor([float("inf")]))).repeat(16).view(-1, 16)
    truth = functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(gelu(x).double(), truth, rtol=1e-6, atol=1e-6)
    odd = torch.tensor([float("nan"), 1.0]).repeat(16).view(2, 16)
    assert torch.equal(gelu(odd).isnan(), odd.isnan())


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("eps", [1e-6, 0.1, None])
def test_rms_norm_errs_as_float32_does(x, eps):
    for weight in (None, normal(x.shape[-1], seed=1)):
        scale, rest = (None if weight is None else weight.double()), x.shape[-1:]
        least = torch.finfo(torch.float32).eps if eps is None else eps
        truth = functional.rms_norm(x.double(), rest, scale, least)
        got = rms_norm(x, weight, eps)
        assert got.shape == x.shape and got.is_contiguous()
        torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-9)


def test_half_a_weight_will_do():
    x, weight = normal(4, 64), normal(64, seed=1).half()
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x, weight.float(), 1e-6))


def test_others_are_left_to_torch(monkeypatch):
    x, weight = normal(4, 64), normal(64, seed=1)
    others = [x.double(), x.to("meta"), normal(4, 60), normal(64), normal(1, 1, 1, 4, 64)]
    others += [normal(64, 4).T, normal(4, 64).requires_grad_(), torch._neg_view(normal(4, 64))]
    others += [normal(4, 64).to_sparse(), normal(4, 64).as_subclass(Marked), normal(0, 64)]
    for other in others:
        assert gelu(other) is None
        assert rms_norm(other, None, 1e-6) is None
    assert rms_norm(x, normal(32), 1e-6) is None
    assert rms_norm(x, weight.requires_grad_(), 1e-6) is None
    with torch.no_grad():
        assert rms_norm(x, weight, 1e-6) is not None
    monkeypatch.setattr(pointwise, "_LEAST", x.numel() + 1)
    assert gelu(x) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_torchs_default_type_and_device_do_not_matter(dtype):
    x, weight = normal(4, 64), normal(64, seed=1)
    wanted = gelu(x), rms_norm(x, weight, 1e-6), rms_norm(x, None, 1e-6)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            got = gelu(x), rms_norm(x, weight, 1e-6), rms_norm(x, None, 1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, wanted))


def test_powers_err_as_float32s_do():
    """Not below the last exponent but one, and 2^0 exactly."""
    module = importlib.import_module("fewstep.quant.numba_pointwise")
    memory = importlib.import_module("fewstep.quant.numba_memory")
    numba = importlib.import_module("numba")

    @numba.njit
    def powers(t, out):
        for i in range(0, len(t), memory.LANES):
            memory.store(out, i, module.power_of_2(memory.load(t, i)))

    t = torch.arange(-(2**17), 125 * 2**10, dtype=torch.float32) / 2**10  # from -128 on
    out = torch.empty_like(t)
    powers(t.numpy(), out.numpy())
    assert out[2**17] == 1
    torch.testing.assert_close(out.double(), t.double().clamp(-125).exp2(), rtol=2e-7, atol=0)
