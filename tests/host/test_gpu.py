"""The GPU's product of packed weights inside the host's layers: when it is asked for, and that all
else is as without it. A stand-in multiplies on the CPU as torch does, so that results are equal;
tests/quant has the kernel itself.
"""

import pytest
import torch
from fewstep.host import loading
from fewstep.host.layout import wrap
from fewstep.host.ops import gguf_ops
from fewstep.quant import dequantize, fused
from fewstep.tests.host import toys
from fewstep.tests.host.test_compiled import compiled, forgotten, graphs  # noqa: F401  a fixture
from fewstep.tests.host.test_cpu import layer
from fewstep.tests.host.test_loading import sample
from fewstep.tests.host.test_lora import load, lokr, low_rank
from fewstep.tests.quant.test_fused import found
from gguf import GGMLQuantizationType as T

# A side branch is added to the product after its bias, in another order than to the weight.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


class Kernels:
    """As quant/triton_linear.py, on a clock by which it is always the faster."""

    COMPILED, DTYPES, FAILURES, OF_A_KIND = {T.Q8_0, T.Q4_K}, {torch.float32}, (Exception,), ()

    def __init__(self):
        self.calls, self.error = 0, None

    def linear(self, blocks, qtype, x, bias=None):
        if self.error:
            raise self.error
        self.calls += 1
        weight = dequantize(blocks, qtype, (len(blocks), x.shape[1]), x.dtype)
        return torch.nn.functional.linear(x, weight, bias)

    def milliseconds(self, run, device):
        before = self.calls
        run()
        is_fused, self.calls = self.calls > before, before
        return 1.0 if is_fused else 2.0


@pytest.fixture
def kernels(monkeypatch):
    return found(Kernels(), monkeypatch)


def product(linear, x):
    with torch.inference_mode():
        return linear(x)


def plain(x, weight, bias):
    return torch.nn.functional.linear(x, weight.float(), bias.float())


@pytest.mark.parametrize("shape", [(7, 512), (2, 3, 512)])
def test_a_layer_is_multiplied_packed(kernels, shape):
    linear, weight, bias = layer(T.Q4_K)
    x = torch.randn(shape)
    assert torch.equal(product(linear, x), plain(x, weight, bias))
    assert kernels.calls == 1


def test_what_is_not_the_kernels(kernels):
    x = torch.randn(7, 512)
    kept, _, _ = layer(T.Q4_K)
    kept.gguf_residency.budget = 10**9  # unpacked once, and not again
    cast, _, _ = layer(T.Q4_K)
    cast.comfy_force_cast_weights = True  # the node ModelComputeDtype
    for linear in (layer(T.Q4_K, exact=True)[0], layer(T.Q6_K)[0], kept, cast):
        product(linear, x)
    product(layer(T.Q4_K)[0], x.half())
    y = layer(T.Q4_K)[0](x.requires_grad_())  # it has no backward
    y.sum().backward()
    assert x.grad is not None and kernels.calls == 0


def test_a_kernel_that_fails_leaves_the_product_to_torch(kernels, caplog):
    linear, weight, bias = layer(T.Q8_0)
    x = torch.randn(7, 512)
    product(linear, x)
    kernels.error = RuntimeError("no such GPU")
    for _ in range(2):
        assert torch.equal(product(linear, x), plain(x, weight, bias))
    assert caplog.text.count("no such GPU") == 1


def test_a_weight_is_given_back_though_memory_ran_out(kernels, monkeypatch):
    linear, _, _ = layer(T.Q8_0)
    x, given_back, uncast = torch.randn(7, 512), [], linear.uncast
    product(linear, x)
    monkeypatch.setattr(linear, "uncast", lambda *given: given_back.append(given) or uncast(*given))
    kernels.error = torch.OutOfMemoryError("none left")
    with pytest.raises(torch.OutOfMemoryError):
        product(linear, x)
    assert len(given_back) == 1


def test_a_weight_that_is_not_finite_is_still_named(kernels):
    blocks, qtype, shape = toys.random_blocks(torch.empty(96, 512), T.Q8_0)
    blocks[5, :2] = torch.tensor([0xFF, 0x7F], dtype=torch.uint8)  # a scale: NaN
    linear = gguf_ops("toy.gguf").Linear(512, 96, bias=False)
    linear.load_state_dict({"weight": wrap(blocks, qtype, shape)})
    with pytest.raises(ValueError, match=r"toy\.gguf: tensor weight holds NaN"):
        product(linear, torch.randn(7, 512))
    assert kernels.calls == 1


def test_a_model_draws_the_same_with_loras_too(kernels, tmp_path, monkeypatch):
    toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    ways = {"plain": model, "low rank": load(model, low_rank()), "dense": load(model, lokr())}
    drawn, calls = {}, []
    for name, way in ways.items():
        drawn[name] = sample(way)
        calls.append(kernels.calls)
    assert 0 < calls[0] == calls[1] - calls[0]  # with a side branch the weight stays packed
    assert calls[0] > calls[2] - calls[1] > 0  # one weight is patched dense
    monkeypatch.setattr(fused, "_kernels", lambda device: None)
    for name, way in ways.items():
        torch.testing.assert_close(drawn[name], sample(way), **CLOSE)
    assert kernels.calls == calls[2]
    assert not torch.allclose(drawn["plain"], drawn["low rank"], atol=1e-2)


def test_a_compiled_layer_is_one_graph_with_it(kernels):
    linear, weight, bias = layer(T.Q4_K)
    run, x = torch.compile(linear, backend="aot_eager", fullgraph=True), torch.randn(7, 512)
    assert torch.equal(product(run, x), plain(x, weight, bias))
    assert kernels.calls == graphs() == 1
    kernels.error = RuntimeError("no such GPU")  # what is chosen within compiles nothing again
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(product(run, x), plain(x, weight, bias))


def test_a_compiled_model_with_a_lora_draws_the_same(kernels, tmp_path):
    toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    model = load(loading.load_diffusion_model(str(tmp_path / "m.gguf")), low_rank())
    drawn = sample(compiled(model))
    calls = kernels.calls
    assert calls > 0
    assert torch.equal(drawn, sample(model)) and kernels.calls == 2 * calls
