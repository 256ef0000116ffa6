"""What a CPU is fastest with: matrix products and attention in bfloat16, where it has those.

ComfyUI computes in float32 on every CPU. One with bfloat16 instructions (AVX-512 BF16, AMX, ARM's
BF16) multiplies bfloat16 matrices about four times as fast, and sums them in float32. So here a
weight that is quantised, or stored in bfloat16, meets activations rounded to bfloat16, and the
result returns to the activations' type, in which all the rest of the model is computed. Weights
stored more finely (float16, float32) are multiplied as the host would, and so are small ones, where
it would bring little: small models draw as their dequantised weights do, but that sums may run in
another order (`multiply_packed`). On a CPU without such instructions all is float32.

A VAE computes in bfloat16 throughout, as ComfyUI has it do on a GPU, and its convolutions find the
channels side by side (torch's `channels_last`), as oneDNN wants them. On a CPU without bfloat16 its
convolutions are float32's, by a kernel with a quarter of the products (`convolutions.py`).

`--fp32-unet`, `--fp32-text-enc`, `--force-fp32`, or the node ModelComputeDtype, ask the host for
float32: then all is computed as the host would, bit for bit. (The host itself sets a compute type,
as that node does, for all text encoders.) `--fp32-vae` does for a VAE.
"""

import logging
import weakref
from functools import cache

import comfy.model_management
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules import mmdit

from ..quant import (
    PLAIN_QTYPES,
    attend,
    gelu,
    multiplies_many,
    multiply_few,
    multiply_many,
    rms_norm,
)
from .layout import is_gguf

log = logging.getLogger(__name__)

LARGE_WEIGHT = 2**20  # weights of a matrix above which its product is worth rounding for
LARGE_QUERY = 2**18  # numbers in an attention's queries, likewise


def capabilities() -> dict[str, bool]:
    """This CPU's instructions by torch's names: "avx2", "amx_bf16"; none in older torch."""
    return getattr(torch.cpu, "get_capabilities", dict)()


@torch.compiler.assume_constant_result
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return _ask_and_tell()


@cache
def _ask_and_tell() -> bool:
    found = sorted(name for name, there in capabilities().items() if there and "bf16" in name)
    if found:
        log.info("CPU with %s: quantised weights are multiplied in bfloat16.", ", ".join(found))
    else:
        log.info("CPU without bfloat16 instructions: quantised weights are multiplied in float32.")
    return bool(found)


def wants_float32(text_encoder: bool = False) -> bool:
    """Whether the host was started with an option that asks for float32."""
    return args.force_fp32 or (args.fp32_text_enc if text_encoder else args.fp32_unet)


def may_choose_for_vae() -> bool:
    """Whether VAEs run on the CPU and no option of the host says in which type."""
    told = args.fp16_vae or args.bf16_vae or args.fp32_vae or args.force_fp32
    return comfy.model_management.is_device_cpu(comfy.model_management.vae_device()) and not told


def vae_dtype() -> torch.dtype | None:
    """The type for a VAE to compute in; None: leave it to the host."""
    return torch.bfloat16 if may_choose_for_vae() and multiplies_bfloat16() else None


def channels_last(module: torch.nn.Module) -> None:
    """Lay the weights of `module`'s convolutions in two and three dimensions out as oneDNN reads
    them; what they put out, and so all between them, is then laid out likewise.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
    module.register_state_dict_post_hook(_plainly)


def _plainly(_module, state_dict, *_) -> None:
    """What is saved of a module lies as safetensors wants it."""
    for name, tensor in state_dict.items():
        state_dict[name] = tensor.contiguous()


def may_choose(module: torch.nn.Module, input: torch.Tensor) -> bool:
    """Whether how to multiply `module` (of our operations) with `input` is ours to choose."""
    return (
        input.is_cpu
        and input.dtype == torch.float32
        and not module.gguf_exact
        and (module.gguf_text or not module.comfy_force_cast_weights)
    )


def is_large(module: torch.nn.Module) -> bool:
    """Whether its weight is."""
    return module.in_features * module.out_features > LARGE_WEIGHT


def may_round(module: torch.nn.Module, input: torch.Tensor) -> bool:
    """Whether that product may also be of bfloat16."""
    return is_large(module) and may_choose(module, input) and multiplies_bfloat16()


def product_dtype(module: torch.nn.Module, input: torch.Tensor) -> torch.dtype:
    """The type in which `module` multiplies its weight with `input`."""
    coarse = is_gguf(module.weight) or module.weight.dtype == torch.bfloat16
    if coarse and may_round(module, input):
        return torch.bfloat16
    return input.dtype


def multiply_packed(module: torch.nn.Module, input: torch.Tensor, branch) -> torch.Tensor | None:
    """`module`'s output, LoRAs of its side branch included, by a kernel that never writes the
    unpacked weight out; None where there is none.

    For a few tokens (as of the modulation from time and text) in float32, but where AMX is faster;
    for more, where the weight is large, in `product_dtype`, with sums and results in float32. The
    weight must be as it was loaded: neither patches nor functions of the host but the side branch.
    """
    if not may_choose(module, input) or not is_gguf(module.weight):
        return None
    weight, bias = module.weight, module.bias
    blocks, qtype = weight._qdata, weight.params.qtype
    flat, dtype = input.reshape(-1, input.shape[-1]), product_dtype(module, input)
    output = multiply_few(blocks, qtype, flat, dtype)
    if output is not None:
        output = output if bias is None else output + bias
        output = output if branch is None else branch.add(output, flat)
    elif is_large(module) and multiplies_many(blocks.shape, qtype, flat.shape[1], dtype):
        factors = None if branch is None else branch.factors
        if branch is not None and factors is None:
            return None
        if module.gguf_residency.keeps(module):
            dense = module.gguf_residency.dense(module, weight, dtype, transient=True)
            blocks, qtype = dense.view(torch.uint8), PLAIN_QTYPES[dtype]
        output = multiply_many(blocks, qtype, flat, dtype, bias, factors)
    return None if output is None else output.reshape(*input.shape[:-1], -1)


class Attention:
    """The host's `optimized_attention_override` for a model on a CPU: a fused attention, torch's or
    our own, in bfloat16 where the CPU has it. The host's own choice takes twice as long and more.
    """

    def __init__(self, model):
        self.model = model

    def __call__(self, default, q, k, v, heads, mask=None, **options):
        if asks_float32(self.model) or q.device.type != "cpu" or q.numel() <= LARGE_QUERY:
            return default(q, k, v, heads, mask=mask, **options)
        dtype = q.dtype
        if dtype == torch.float32 and multiplies_bfloat16():
            if mask is None and (attended := by_kernel(q, k, v, heads, **options)) is not None:
                return attended
            q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
            if mask is not None and mask.is_floating_point():
                mask = mask.to(torch.bfloat16)
        return attention_pytorch(q, k, v, heads, mask=mask, **options).to(dtype)


def by_kernel(q, k, v, heads, skip_reshape=False, skip_output_reshape=False, **options):
    """The host's attention by our kernel, where there is one for it; else None."""
    if options.get("enable_gqa") or options.get("scale") is not None:
        return None
    if skip_reshape:  # (pictures, heads, tokens, width)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    else:
        q, k, v = (t.reshape(len(t), t.shape[1], heads, -1) for t in (q, k, v))
    attended = attend(q, k, v)
    if attended is None:
        return None
    return attended.transpose(1, 2) if skip_output_reshape else attended.flatten(2)


class _Pointwise:
    """Mixin for a network's module without products: by our kernel, where there is one for what it
    is given. `gguf_model` refers weakly to the BaseModel that it is part of.
    """

    def forward(self, input):
        plain = torch.compiler.is_compiling() or asks_float32(self.gguf_model())
        made = None if plain else self.by_kernel(input)
        return super().forward(input) if made is None else made


class _GELU(_Pointwise, torch.nn.GELU):
    def by_kernel(self, input):
        return gelu(input) if self.approximate == "tanh" else None


class _RMSNorm(_Pointwise, mmdit.RMSNorm):
    def by_kernel(self, input):
        return normalize(self, input)


_POINTWISE = {torch.nn.GELU: _GELU, mmdit.RMSNorm: _RMSNorm}


def normalize(norm: torch.nn.Module, input: torch.Tensor) -> torch.Tensor | None:
    """The output of an RMS norm by our kernel, where there is one for it."""
    patched = getattr(norm, "weight_function", None) or getattr(norm, "bias_function", None)
    if patched or norm.weight is None or norm.weight.dim() != 1:
        return None
    return rms_norm(input, norm.weight, norm.eps)


def asks_float32(model) -> bool:
    """Whether the node ModelComputeDtype told the BaseModel what to compute in."""
    patcher = None if model is None else model.current_patcher
    return patcher is not None and patcher.force_cast_weights


def use_fast_kernels(patcher) -> None:
    """Give a MODEL that runs on a CPU the fast attention, activations and norms, unless the host
    was asked for float32.
    """
    if not comfy.model_management.is_device_cpu(patcher.load_device) or wants_float32():
        return
    options = patcher.model_options["transformer_options"]
    options.setdefault("optimized_attention_override", Attention(patcher.model))
    for module in patcher.model.diffusion_model.modules():
        if type(module) in _POINTWISE:
            module.__class__ = _POINTWISE[type(module)]  # as torch's parametrizations do
            module.gguf_model = weakref.ref(patcher.model)
