"""Tensors by the names that loaders of GGUF files expect, where a source may have others.

T5's are llama.cpp's (gguf-py/gguf/tensor_mapping.py, the encoder half of MODEL_ARCH.T5): city96's
loader reads these, the originals it does not. FLUX's norms have a `scale` (black-forest-labs/flux,
src/flux/modules/layers.py, RMSNorm), and Chroma's too; ComfyUI has since renamed it `weight`, in
memory and in what it saves, which stable-diffusion.cpp and older ComfyUIs do not know.
"""

import re
from collections.abc import Callable, Collection

_BLOCK = re.compile(r"encoder\.block\.(\d+)\.layer\.([01])\.(.+)")
_PARTS = {
    "0.SelfAttention.q.weight": "attn_q.weight",
    "0.SelfAttention.k.weight": "attn_k.weight",
    "0.SelfAttention.v.weight": "attn_v.weight",
    "0.SelfAttention.o.weight": "attn_o.weight",
    "0.SelfAttention.relative_attention_bias.weight": "attn_rel_b.weight",
    "0.layer_norm.weight": "attn_norm.weight",
    "1.DenseReluDense.wi_0.weight": "ffn_gate.weight",
    "1.DenseReluDense.wi_1.weight": "ffn_up.weight",
    "1.DenseReluDense.wi.weight": "ffn_up.weight",
    "1.DenseReluDense.wo.weight": "ffn_down.weight",
    "1.layer_norm.weight": "ffn_norm.weight",
}
_OUTSIDE = {
    "shared.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
}
_SAME_AS_SHARED = "encoder.embed_tokens.weight"  # some files hold the table twice

_NORM = re.compile(
    r"(.*\b(?:query_norm|key_norm|distilled_guidance_layer\.norms\.\d+|nerf_blocks\.\d+\.norm"
    r"|nerf_final_layer(?:_conv)?\.norm))\.weight"
)


def flux_names(names: Collection[str]) -> dict[str, str]:
    """A name of FLUX or Chroma -> the published one."""
    return {name: _NORM.sub(r"\1.scale", name) for name in names}


def llama_cpp_names(names: Collection[str]) -> dict[str, str]:
    """T5's own name -> llama.cpp's; the second copy of the vocabulary's table is left out.

    A name that llama.cpp does not know stays as it is.
    """
    renamed = {name: _renamed(name) for name in names if name != _SAME_AS_SHARED}
    if "shared.weight" not in names and _SAME_AS_SHARED in names:
        renamed[_SAME_AS_SHARED] = _OUTSIDE["shared.weight"]
    return renamed


def _renamed(name: str) -> str:
    if (block := _BLOCK.fullmatch(name)) is not None and f"{block[2]}.{block[3]}" in _PARTS:
        return f"enc.blk.{block[1]}.{_PARTS[f'{block[2]}.{block[3]}']}"
    return _OUTSIDE.get(name, name)


# general.architecture -> new names by old; a tensor that has none is left out
RENAMERS: dict[str, Callable[[Collection[str]], dict[str, str]]] = {
    "flux": flux_names,
    "t5encoder": llama_cpp_names,
}
