"""Small models under the names of real architectures, written as safetensors on the spot."""

import json
import struct

import torch


def sd3(depth=2, width=256, dtype=torch.bfloat16, seed=0):
    """Names and proportions of an SD3, `width` in place of 64 * depth."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "pos_embed": (1, 16, width),
        "x_embedder.proj.weight": (width, 16, 2, 2),
        "x_embedder.proj.bias": (width,),
        "context_embedder.weight": (width, 512),
        "t_embedder.mlp.0.weight": (width, 256),
        "y_embedder.mlp.0.weight": (width, 512),
        "final_layer.linear.weight": (64, width),
    }
    for block in range(depth):
        for side in ("context_block", "x_block"):
            stem = f"joint_blocks.{block}.{side}."
            shapes |= {
                stem + "attn.qkv.weight": (3 * width, width),
                stem + "attn.qkv.bias": (3 * width,),
                stem + "attn.proj.weight": (width, width),
                stem + "mlp.fc1.weight": (4 * width, width),
                stem + "mlp.fc2.weight": (width, 4 * width),
                stem + "adaLN_modulation.1.weight": (6 * width, width),
            }
    return {name: (torch.randn(s, generator=g) * 0.05).to(dtype) for name, s in shapes.items()}


def names_of(*stems):
    """Tensors of 64 x 256 under these names."""
    return {stem: torch.ones(64, 256) for stem in stems}


def header_only(path, tensors, data=b""):
    """A safetensors file put together by hand: {name: (dtype, shape, first, last)}."""
    header = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}
        for name, (dtype, shape, first, last) in tensors.items()
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
