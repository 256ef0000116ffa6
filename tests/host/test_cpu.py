"""Products and attention in bfloat16 under float32 activations: their error, and the way around."""

import logging

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import attention_sub_quad
from comfy.ldm.wan.vae import WanVAE
from fewstep.demo.export import FILES
from fewstep.demo.shipped import MODELS
from fewstep.host import convolutions, cpu, loading
from fewstep.host.files import read
from fewstep.host.layout import dense, wrap
from fewstep.host.ops import gguf_ops
from fewstep.quant import convolves, dequantize, multiplies_many, pointwise
from fewstep.quant.kernels import find_kernels
from fewstep.tests.host import toys
from fewstep.tests.host.test_loading import sample
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file

# bfloat16 has 8 bits: a rounding errs by at most 2**-9 of a value. Weights, inputs and results are
# each rounded once, independently, and sums are in float32: √3·2**-9/√3 in the mean square.
ERROR = 2**-8


@pytest.fixture
def bfloat16(monkeypatch):
    """As on a CPU that multiplies bfloat16 (others compute the same, but slowly), and as if the
    toys here were large enough for it to pay.
    """
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(cpu, "LARGE_WEIGHT", 0)
    monkeypatch.setattr(cpu, "LARGE_QUERY", 0)


@pytest.fixture
def float32(monkeypatch):
    """As on a CPU that does not multiply bfloat16, and as if the toys here were large."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(cpu, "LARGE_WEIGHT", 0)


def relative_error(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def has_amx():
    """Whether the kernels for CPUs multiply by it."""
    numba_jit = find_kernels("numba_jit", "testing")
    return numba_jit is not None and numba_jit.AMX


def layer(qtype, rows=96, columns=512, exact=False):
    g = torch.Generator().manual_seed(0)
    linear = gguf_ops("toy", exact).Linear(columns, rows)
    blocks, _, shape = toys.random_blocks(torch.empty(rows, columns), qtype)
    bias = torch.randn(rows, generator=g)
    linear.load_state_dict({"weight": wrap(blocks, qtype, shape), "bias": bias})
    return linear, dequantize(blocks, qtype, shape).double(), bias.double()


@pytest.mark.parametrize("tokens", [1, 77, 300])
@pytest.mark.parametrize("qtype", [T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_XS, T.Q8_0])
def test_products_error_is_that_of_bfloat16(bfloat16, qtype, tokens):
    linear, weight, bias = layer(qtype)
    x = torch.randn(1, tokens, 512, generator=torch.Generator().manual_seed(1))
    y = linear(x)
    truth = x.double() @ weight.T + bias
    assert y.dtype == torch.float32 and torch.equal(linear(x), y)
    few = tokens == 1 and not has_amx()  # multiplied in float32
    assert relative_error(y, truth) < (1e-6 if few else ERROR)


@pytest.mark.parametrize("memory", [0, 10**9])
@pytest.mark.parametrize("tokens", [1, 5, 77])
def test_products_in_float32(float32, tokens, memory):
    """Where the CPU has a kernel for them, without unpacking the weight first."""
    linear, weight, bias = layer(T.Q6_K)
    linear.gguf_residency.budget = memory
    x = torch.randn(1, tokens, 512, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # to each belong whole tiles of rows
    try:
        with torch.no_grad():
            y = linear(x)
        there = multiplies_many((96, 420), T.Q6_K, 512, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert relative_error(y, x.double() @ weight.T + bias) < 1e-6
    assert bool(linear.gguf_residency.scratch) == (tokens > 4 and not memory and not there)


@pytest.mark.parametrize("tokens", [1, 7])
def test_products_have_a_gradient(tokens):
    """By the kernels there is none; small weights, and few tokens, have kernels as well."""
    linear, weight, _ = layer(T.Q6_K)
    x = torch.randn(1, tokens, 512, generator=torch.Generator().manual_seed(1), requires_grad=True)
    linear(x).sum().backward()
    assert relative_error(x.grad[0], weight.sum(0).expand(tokens, -1)) < 1e-5
    assert relative_error(linear(x.detach()), linear(x)) < 1e-6


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_bias_has_a_gradient_too(bfloat16, tokens):
    linear, _, _ = layer(T.Q6_K)
    linear.bias.requires_grad_(True)
    linear(torch.ones(1, tokens, 512)).sum().backward()
    assert torch.equal(linear.bias.grad, torch.full((96,), float(tokens)))


def test_exact_products_are_float32s(bfloat16):
    x = torch.randn(2, 7, 512)
    linear, weight, bias = layer(T.Q6_K, exact=True)
    for _ in range(2):
        assert torch.equal(linear(x), torch.nn.functional.linear(x, weight.float(), bias.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finer_weights_are_multiplied_as_the_host_does(bfloat16, dtype):
    linear, weight = gguf_ops("toy").Linear(64, 32, bias=False), torch.randn(32, 64).to(dtype)
    linear.load_state_dict({"weight": weight})
    x = torch.randn(5, 64)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, weight.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_activations_keep_their_type(bfloat16, dtype):
    linear, weight, bias = layer(T.Q8_0)
    x = torch.randn(5, 512).to(dtype)
    wanted = torch.nn.functional.linear(x, weight.to(dtype), bias.to(dtype))
    assert torch.equal(linear(x), wanted)


class Model:
    current_patcher = None


def attention(q, k, v, heads, **options):
    return cpu.Attention(Model)(attention_sub_quad, q, k, v, heads, **options)


@pytest.mark.parametrize("heads", [4, 2])  # of width 32 by torch's kernel, 64 by ours, if there
@pytest.mark.parametrize("mask", [None, torch.zeros(150, 150)])
def test_attentions_error_is_that_of_bfloat16(bfloat16, heads, mask):
    q, k, v = torch.randn(3, 2, 150, 128, generator=torch.Generator().manual_seed(2))
    truth = attention_sub_quad(q.double(), k.double(), v.double(), heads)
    got = attention(q, k, v, heads, mask=mask)
    assert got.dtype == torch.float32
    assert relative_error(got, truth) < ERROR


def test_attention_in_the_shapes_that_models_ask_for(bfloat16):
    q, k, v = torch.randn(3, 2, 150, 128, generator=torch.Generator().manual_seed(2))
    plain = attention(q, k, v, 2)
    apart = [t.view(2, 150, 2, 64).transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(attention(*apart, 2, skip_reshape=True), plain)
    got = attention(*apart, 2, skip_reshape=True, skip_output_reshape=True)
    assert torch.equal(got.transpose(1, 2).flatten(2), plain)
    assert torch.equal(attention(q, k, v.view(2, 150, 2, 64), 2), plain)  # as MMDiT leaves v


@pytest.mark.parametrize("qtype", [T.Q6_K, T.Q4_K])
def test_a_sampled_latent_is_close_to_the_dequantised_models(bfloat16, tmp_path, qtype):
    """Random weights amplify more than trained ones: 1 % covers two steps of four blocks."""
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit(depth=4), qtype)
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    drawn, truth = sample(model), sample(comfy.sd.load_diffusion_model_state_dict(dense))
    assert not torch.equal(drawn, truth)
    assert relative_error(drawn, truth) < 0.01


def test_a_small_model_draws_as_its_dequantised_weights(tmp_path):
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit(depth=4), T.Q6_K)
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    truth = sample(comfy.sd.load_diffusion_model_state_dict(dense))
    assert relative_error(sample(model), truth) < 1e-5  # sums of few tokens run in another order


def test_a_large_weight_is_multiplied_in_bfloat16(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    x = torch.randn(1, 8, 2048)
    for rows, dtype in ((512, torch.float32), (768, torch.bfloat16)):
        linear, _, _ = layer(T.Q6_K, rows, 2048)
        assert cpu.product_dtype(linear, x) == dtype


def test_compute_dtype_node_asks_for_float32(bfloat16, monkeypatch, tmp_path):
    """What ModelComputeDtype does, on a clone: the model itself stays fast."""
    monkeypatch.setattr(pointwise, "_LEAST", 0)
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit(depth=4), T.Q6_K)
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    fast = sample(model)
    exact = model.clone()
    exact.set_model_compute_dtype(torch.float32)
    assert torch.equal(sample(exact), sample(comfy.sd.load_diffusion_model_state_dict(dense)))
    assert torch.equal(sample(model), fast)


@pytest.mark.parametrize("qtype", [T.F32, T.Q6_K])
def test_activations_and_norms_draw_the_same(monkeypatch, tmp_path, qtype):
    toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit(depth=4), qtype)
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    assert set(cpu._POINTWISE.values()) <= {type(module) for module in model.model.modules()}
    plain = sample(model)
    monkeypatch.setattr(pointwise, "_LEAST", 0)
    drawn = sample(model)
    assert not torch.equal(drawn, plain)
    assert relative_error(drawn, plain) < 1e-5


@pytest.mark.parametrize("option", ["fp32_unet", "force_fp32"])
def test_options_of_the_host_ask_for_float32(bfloat16, monkeypatch, tmp_path, option):
    monkeypatch.setattr(args, option, True)
    monkeypatch.setattr(pointwise, "_LEAST", 0)
    dense = toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf"))
    assert torch.equal(sample(model), sample(comfy.sd.load_diffusion_model_state_dict(dense)))


def test_an_attention_of_the_users_own_wins(bfloat16, tmp_path):
    toys.write(tmp_path / "m.gguf", "sd3", toys.mmdit())
    model = loading.load_diffusion_model(str(tmp_path / "m.gguf")).clone()
    seen = []

    def own(default, *tensors, **options):
        seen.append(default)
        return default(*tensors, **options)

    model.model_options["transformer_options"]["optimized_attention_override"] = own
    sample(model, 1)
    assert seen


@pytest.fixture(scope="module")
def vae_files(tmp_path_factory):
    """A VAE of two dimensions (the demo's) and one of three (Wan's, narrow), and how they are
    told from each other.
    """
    wan = WanVAE(dim=32, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    g = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in wan.state_dict().items():
        plain = tensor.dim() < 4 or "gamma" in name
        noise = torch.randn(tensor.shape, generator=g) / tensor[0].numel() ** 0.5
        weights[name] = torch.full_like(tensor, float("gamma" in name)) if plain else noise
    path = tmp_path_factory.mktemp("vae") / "wan.safetensors"
    save_file(weights, path)
    return {4: str(MODELS / FILES["vae"]), 5: str(path)}


def decoded(vae, dimensions):
    """A picture, or of three dimensions three frames: (…, height, width, 3) in [0, 1]."""
    shape = (1, 16, 4, 4) if dimensions == 4 else (1, 16, 1, 4, 4)
    return vae.decode(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dimensions", [4, 5])
def test_a_vae_computes_in_bfloat16(bfloat16, monkeypatch, vae_files, dimensions):
    vae = loading.load_vae(vae_files[dimensions])
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[dimensions]
    convolutions = [p for p in vae.first_stage_model.parameters() if p.dim() == dimensions]
    assert all(p.is_contiguous(memory_format=layout) for p in convolutions)
    assert {p.dtype for p in convolutions} == {vae.vae_dtype} == {torch.bfloat16}
    monkeypatch.setattr(args, "fp32_vae", True)
    plain = loading.load_vae(vae_files[dimensions])
    assert plain.vae_dtype == torch.float32
    drawn, truth = decoded(vae, dimensions), decoded(plain, dimensions)
    assert drawn.dtype == torch.float32 and not torch.equal(drawn, truth)
    assert (drawn - truth).square().mean().sqrt() < 0.01  # 40 dB


@pytest.mark.parametrize("option", ["fp32_vae", "fp16_vae", "bf16_vae", "force_fp32"])
def test_options_of_the_host_decide_a_vaes_type(bfloat16, monkeypatch, vae_files, option):
    monkeypatch.setattr(args, option, True)
    host = comfy.sd.VAE(sd=comfy.utils.load_torch_file(vae_files[5]))
    vae = loading.load_vae(vae_files[5])
    assert vae.vae_dtype == host.vae_dtype
    assert all(p.is_contiguous() for p in vae.first_stage_model.parameters())


def test_a_vae_that_has_no_bfloat16_stays_as_the_host_has_it(bfloat16, monkeypatch, vae_files):
    class Exact(comfy.sd.VAE):
        """As those of sound are: told by the host only once they are built."""

        working_dtypes = property(lambda vae: [torch.float32], lambda vae, dtypes: None)

    monkeypatch.setattr(comfy.sd, "VAE", Exact)
    vae = loading.load_vae(vae_files[4])
    assert vae.vae_dtype == torch.float32
    assert {p.dtype for p in vae.first_stage_model.parameters()} == {torch.float32}


@torch.inference_mode()  # as a graph runs
@pytest.mark.parametrize("dimensions", [4, 5])
def test_a_cpu_without_bfloat16_decodes_as_the_host_does(float32, vae_files, dimensions):
    vae = loading.load_vae(vae_files[dimensions])
    assert {p.dtype for p in vae.first_stage_model.parameters()} == {torch.float32}
    shape = (1, 16, 8, 12) if dimensions == 4 else (1, 16, 2, 8, 12)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    drawn, truth = vae.decode(latent), host_vae(vae_files[dimensions]).decode(latent)
    torch.testing.assert_close(drawn, truth, atol=1e-4, rtol=0)  # a fortieth of a grey level
    picture = torch.rand(drawn.shape[-4:], generator=torch.Generator().manual_seed(0))
    read, truth = vae.encode(picture), host_vae(vae_files[dimensions]).encode(picture)
    torch.testing.assert_close(read, truth, atol=1e-3, rtol=1e-3)
    fast = [m for m in vae.first_stage_model.modules() if isinstance(m, convolutions._ByKernel)]
    assert bool(fast) == convolves(torch.zeros(64, 64, 3, 3))


def host_vae(path):
    return comfy.sd.VAE(sd={name: dense(tensor) for name, tensor in read(path)[0].items()})


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_a_vae_is_saved_by_the_hosts_node(request, kind, vae_files, tmp_path):
    request.getfixturevalue(kind)
    state_dict, path = loading.load_vae(vae_files[4]).get_sd(), str(tmp_path / "vae.safetensors")
    comfy.utils.save_torch_file(state_dict, path, metadata={})  # as VAESave
    again = comfy.utils.load_torch_file(path)
    assert all(torch.equal(again[name], tensor) for name, tensor in state_dict.items())


@torch.inference_mode()
def test_a_latent_of_another_model_is_told_by_torch(float32, vae_files):
    vae = loading.load_vae(vae_files[4])
    with pytest.raises(RuntimeError, match="to have 16 channels, but got 32"):
        vae.first_stage_model.decode(torch.zeros(1, 32, 32, 32))


def set_circular(conv):
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = (1, 1, 1, 1)


def replace_method(conv):
    def circular(conv, input, weight, bias):
        wrapped = torch.nn.functional.pad(input, (1, 1, 1, 1), mode="circular")
        return torch.nn.functional.conv2d(wrapped, weight, bias, conv.stride)

    conv._conv_forward = circular.__get__(conv)


@torch.inference_mode()
@pytest.mark.parametrize("kind, error", [("bfloat16", 0.02), ("float32", 1e-4)])
@pytest.mark.parametrize("change", [set_circular, replace_method])
def test_a_vae_whose_padding_a_node_sets_draws_with_it(request, kind, error, change, vae_files):
    """As nodes for seamless pictures do, after loading."""
    request.getfixturevalue(kind)
    latent, pictures = torch.ones(1, 16, 8, 8), []
    for vae in (loading.load_vae(vae_files[4]), host_vae(vae_files[4])):
        zeros = vae.decode(latent)
        for module in vae.first_stage_model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                change(module)
        pictures.append(vae.decode(latent))
        assert (pictures[-1] - zeros).abs().max() > 2 * error
    torch.testing.assert_close(*pictures, atol=error, rtol=0)


def test_says_once_what_the_cpu_can_do(caplog):
    cpu._ask_and_tell.cache_clear()
    with caplog.at_level(logging.INFO, logger=cpu.__name__):
        assert cpu.multiplies_bfloat16() == cpu.multiplies_bfloat16()
    assert len(caplog.records) == 1 and "bfloat16" in caplog.text
