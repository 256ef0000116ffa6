"""Tiny random text encoders of the host's own classes, without a file, built once: leave them be.

clip = sd3_clip("l", "g", "t5")  # any of SD3's encoders; flux_clip() for FLUX.1's pair
"""

from functools import cache
from types import SimpleNamespace

import comfy.sd
import torch
from comfy import sdxl_clip as sdxl
from comfy.text_encoders import flux
from comfy.text_encoders import sd3_clip as sd3

L_WIDTH, G_WIDTH = 32, 48


def fill(parameters):
    """Put reproducible noise into the parameters, in their order (CLIP-L, CLIP-G, T5)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def clip_of(encoder_class, tokenizer, embeddings=None):
    """A stock CLIP of shrunken encoders: CLIP-L and -G of 3 layers, T5 of 1 layer."""
    target = SimpleNamespace(params={}, clip=encoder_class, tokenizer=tokenizer)
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=embeddings,
        model_options={
            "clip_l_model_config": {**sizes, "hidden_size": L_WIDTH},
            "clip_g_model_config": {**sizes, "hidden_size": G_WIDTH},
            "t5xxl_model_config": {"num_layers": 1, "num_heads": 2, "d_ff": 64, "d_kv": 8},
        },
    )
    encoder = clip.cond_stage_model
    vocabularies = [n for n, p in encoder.named_parameters() if p.ndim == 2 and len(p) > 30_000]
    fill((p for name, p in encoder.named_parameters() if name not in vocabularies))
    for name in vocabularies:
        # one column, seen as wide as the encoder: T5's would take half a gigabyte
        weight = encoder.get_parameter(name)
        column = torch.randn(len(weight), 1, generator=torch.Generator().manual_seed(1))
        weight.data = column.expand(weight.shape)
    return clip


@cache
def sd3_clip(*encoders, embeddings=None):
    """SD3's CLIP with the `encoders` named ("l", "g", "t5"); `embeddings`: a folder of them."""
    flags = {"clip_l": "l" in encoders, "clip_g": "g" in encoders, "t5": "t5" in encoders}
    return clip_of(sd3.sd3_clip(**flags), sd3.SD3Tokenizer, embeddings)


@cache
def flux_clip():
    """FLUX.1's CLIP: CLIP-L and T5."""
    return clip_of(flux.flux_clip(), flux.FluxTokenizer)


@cache
def sdxl_clip():
    """SDXL's CLIP: CLIP-L and CLIP-G."""
    return clip_of(sdxl.SDXLClipModel, sdxl.SDXLTokenizer)
