"""The names and shapes of published models, with as few layers as their readers allow.

A function for each; `write` makes the safetensors file, of random weights, or of zeros, which take
no room on the disk.
"""

import json
import math
import struct
from pathlib import Path

import comfy.ops
import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfy.taesd import taesd
from comfy.text_encoders.t5 import T5
from fewstep.tests.host import toys

Shapes = dict[str, tuple[int, ...]]
META = {"device": "meta", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}
SPREAD = 0.02  # standard deviation of the weights


def _of(module: torch.nn.Module, prefix: str = "") -> Shapes:
    return {prefix + name: tuple(t.shape) for name, t in module.state_dict().items()}


def sd3(depth: int = 2) -> Shapes:
    return _of(toys.mmdit_shapes(depth))


def flux(width: int = 256) -> Shapes:
    """FLUX.1-dev with a block of each kind; `width` 3072 in the published one."""
    config = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768}
    config |= {"context_in_dim": 4096, "hidden_size": width, "num_heads": width // 128}
    config |= {"mlp_ratio": 4.0, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56]}
    config |= {"theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}
    shapes = _of(Flux(**config, **META))  # the host has since renamed the norms
    return {name.replace("_norm.weight", "_norm.scale"): size for name, size in shapes.items()}


def wan(width: int = 256, layers: int = 1) -> Shapes:
    """Wan 2.1 T2V; 1536 and 30 in the published 1.3B."""
    inner = 35 * width // 6 // 256 * 256  # 8960
    return _of(
        WanModel(dim=width, ffn_dim=inner, num_heads=width // 128, num_layers=layers, **META)
    )


def qwen_image() -> Shapes:
    return _of(QwenImageTransformer2DModel(num_layers=1, **META))


def z_image(layers: int = 1) -> Shapes:
    """30 in the published one."""
    config = {"in_channels": 16, "dim": 3840, "n_layers": layers, "n_heads": 30, "n_kv_heads": 30}
    config |= {"ffn_dim_multiplier": 8 / 3, "qk_norm": True, "cap_feat_dim": 2560}
    config |= {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0}
    config |= {"z_image_modulation": True, "pad_tokens_multiple": 32}
    return _of(NextDiT(**config, **META))


def sdxl(depths: tuple[int, int] = (2, 10)) -> Shapes:
    """(1, 2): Segmind's Vega, the smallest of the family."""
    low, high = depths
    config = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320}
    config |= {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "num_head_channels": 64}
    config |= {"transformer_depth": [0, 0, low, low, high, high], "context_dim": 2048}
    config |= {"transformer_depth_output": [0, 0, 0, *[low] * 3, *[high] * 3]}
    config |= {"transformer_depth_middle": high if high > 2 else -1, "adm_in_channels": 2816}
    config |= {"num_classes": "sequential", "use_spatial_transformer": True, "legacy": False}
    return _of(UNetModel(use_linear_in_transformer=True, **config, **META))


def clip_l(layers: int = 12) -> Shapes:
    return _clip(768, layers, 12, "quick_gelu")


def clip_g(layers: int = 32) -> Shapes:
    return _clip(1280, layers, 20, "gelu")


def _clip(width: int, layers: int, heads: int, activation: str) -> Shapes:
    config = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "hidden_act": activation, "eos_token_id": 49407}
    config |= {"max_position_embeddings": 77}
    return _of(CLIPTextModel(config, torch.float32, "meta", comfy.ops.disable_weight_init))


def t5xxl(layers: int = 24) -> Shapes:
    """With the copy of the vocabulary's table that published files hold."""
    config = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "vocab_size": 32128}
    config |= {"num_layers": layers, "model_type": "t5", "is_gated_act": True}
    shapes = _of(T5(config | {"dense_act_fn": "gelu_pytorch_tanh"}, **META))
    return shapes | {"encoder.embed_tokens.weight": shapes["shared.weight"]}


def vae(channels: int = 16) -> Shapes:
    """FLUX's (ae.safetensors) and SD3's."""
    config = {"double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3}
    config |= {"out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    config |= {"attn_resolutions": [], "dropout": 0.0}
    return _of(Encoder(**config), "encoder.") | _of(Decoder(**config), "decoder.")


def tae(channels: int = 16) -> Shapes:
    """taef1 and taesd3 as published for diffusers, whose decoder counts from the layer after."""
    decoder = {}
    for name, shape in _of(taesd.Decoder(channels)).items():
        number, dot, rest = name.partition(".")
        decoder[f"decoder.layers.{int(number) - 1}{dot}{rest}"] = shape
    return _of(taesd.Encoder(channels), "encoder.layers.") | decoder


def sd3_medium() -> Shapes:
    """SD3.5-Medium in full."""
    return _of(toys.mmdit_shapes(24, positions=384, dual_blocks=13))


def sdxl_checkpoint() -> Shapes:
    """All of SDXL's parts in one file."""
    encoder = "conditioner.embedders.1.model."
    parts = {"model.diffusion_model.": sdxl(), "first_stage_model.": vae(4), encoder: _open_clip()}
    parts["conditioner.embedders.0.transformer."] = clip_l()
    quant = {"quant_conv": (8, 8, 1, 1), "post_quant_conv": (4, 4, 1, 1)}
    for name, shape in quant.items():
        sizes = {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        parts["first_stage_model."] |= sizes
    return {prefix + name: shape for prefix, part in parts.items() for name, shape in part.items()}


def _open_clip(width: int = 1280, layers: int = 32) -> Shapes:
    """CLIP-G as OpenCLIP names it."""
    matrix, row = (width, width), (width,)
    shapes = {"token_embedding.weight": (49408, width), "positional_embedding": (77, width)}
    shapes |= {"text_projection": matrix, "logit_scale": ()}
    shapes |= {"ln_final.weight": row, "ln_final.bias": row}
    for layer in range(layers):
        block = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
        block |= {"attn.out_proj.weight": matrix, "attn.out_proj.bias": row}
        block |= {"mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)}
        block |= {"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": row}
        norms = {f"{norm}.{part}": row for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {f"transformer.resblocks.{layer}.{k}": v for k, v in (block | norms).items()}
    return shapes


def write(path: Path, shapes: Shapes, zeros: bool = False, dtype: torch.dtype = torch.bfloat16):
    """A safetensors file of two-byte floats: norms of ones, other weights random, or all zeros."""
    label = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**22 + 3, generator=generator).mul(SPREAD).to(dtype)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if zeros:
            file.truncate(8 + len(text) + at)
            return path
        for name, shape in shapes.items():
            numel = math.prod(shape)
            if len(shape) == 1 and name.endswith(("weight", "scale")):
                values = torch.ones(numel, dtype=dtype)
            else:
                values = pool.repeat(-(-numel // len(pool)))[:numel]
            file.write(memoryview(values.view(torch.uint8).numpy()))
    return path
