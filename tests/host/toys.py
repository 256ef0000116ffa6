"""Toy models of real architectures with random weights, written as GGUF files."""

import comfy.ops
import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from fewstep.quant import dequantize, write_gguf
from gguf import GGMLQuantizationType as T
from gguf import quants

PLAIN = {T.F32: torch.float32, T.F16: torch.float16, T.BF16: torch.bfloat16}


def random_state_dict(module, seed=0, scale=0.05):
    """The module's names and shapes with normal values (that float16 holds, as the host may)."""
    g = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    return {
        name: (torch.randn(shape, generator=g) * scale).half().float()
        for name, shape in shapes.items()
    }


def mmdit(depth=2, seed=0):
    """An SD3 of hidden size 64 * depth that the host detects by itself."""
    return random_state_dict(mmdit_shapes(depth), seed)


def mmdit_shapes(depth, positions=16, dual_blocks=0):
    """The same without weights: `positions`² position embeddings, SD3.5-Medium's dual attention."""
    config = {"in_features": 4096, "out_features": 64 * depth}
    return OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        depth=depth,
        adm_in_channels=2048,
        context_embedder_config={"target": "torch.nn.Linear", "params": config},
        num_patches=positions**2,
        pos_embed_max_size=positions,
        x_block_self_attn_layers=list(range(dual_blocks)),
        qk_norm="rms",
        device="meta",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )


CLIP_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def clip_l(seed=1):
    config = CLIP_SIZES | {
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    }
    return random_state_dict(
        CLIPTextModel(config, torch.float32, "meta", comfy.ops.disable_weight_init), seed
    )


def quantised(tensor, qtype):
    """-> what `write_gguf` takes, for a type that gguf-py can write."""
    blocks = torch.from_numpy(quants.quantize(tensor.numpy(), qtype))
    return blocks, qtype, tuple(tensor.shape)


def random_blocks(tensor, qtype, seed=2):
    """Blocks of a type that gguf-py cannot write: random bits under small random scales."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[qtype]
    g = torch.Generator().manual_seed(seed)
    n = tensor.numel() // block
    blocks = torch.randint(0, 256, (n, size), generator=g, dtype=torch.uint8)
    scales = {T.Q6_K: (208,), T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q2_K: (80, 82), T.Q3_K: (108,)}
    for at in scales.get(qtype, (0,)):
        d = (torch.rand(n, 1, generator=g) * 1e-3).to(torch.float16)
        blocks[:, at : at + 2] = d.view(torch.uint8)
    return blocks.reshape(tensor.shape[0], -1), qtype, tuple(tensor.shape)


def write(path, architecture, state_dict, qtype=T.Q8_0, metadata=None, pick=None):
    """Writes a GGUF whose matrices are of `qtype`; returns the dequantised state dict.

    `pick(name, tensor)` says which tensors are quantised (default: every 2-D weight whose rows
    divide).
    """
    import gguf

    block = gguf.GGML_QUANT_SIZES[qtype][0]
    pick = pick or (lambda name, t: name.endswith("weight") and t.ndim == 2)
    tensors, dense = [], {}
    for name, tensor in state_dict.items():
        dense[name] = tensor
        if pick(name, tensor) and qtype in PLAIN:
            tensor = tensor.to(PLAIN[qtype])
            dense[name] = tensor.float()
        elif pick(name, tensor) and tensor.shape[-1] % block == 0:
            make = quantised if qtype in (T.Q8_0, T.Q4_0, T.Q5_1) else random_blocks
            tensor = make(tensor, qtype)
            dense[name] = dequantize(tensor[0], qtype, tensor[2])
        tensors.append((name, tensor))
    write_gguf(str(path), architecture, metadata or {}, tensors)
    return dense
