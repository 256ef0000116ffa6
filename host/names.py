"""Tensor names of GGUF text encoders, in the host's terms.

llama.cpp renames the tensors of the text models that it converts, and reorders some rows. ComfyUI
knows the original (Hugging Face) names. CLIP files and diffusion models keep theirs.
"""

import re

import torch

# llama.cpp's `gguf-py/gguf/tensor_mapping.py`, the encoder half of MODEL_ARCH.T5.
T5 = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}

# The decoder-only models: Llama, Mistral, Qwen, Gemma.
LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Gemma norms the outputs too, so the names of the norms around the feed-forward part differ.
GEMMA = {
    **LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

BLOCK = re.compile(r"(?:enc\.)?blk\.(\d+)\.(.+)")


def is_llama_cpp(names) -> bool:
    """True for the names of a text model converted by llama.cpp."""
    return "token_embd.weight" in names


def text_encoder_name(name: str, architecture: str) -> str | None:
    """llama.cpp's tensor name -> the host's; None for a tensor that an encoder does not need
    (a T5 decoder, tables that the host computes).
    """
    t5 = architecture.startswith("t5")
    table = T5 if t5 else GEMMA if architecture.startswith("gemma") else LLAMA
    stem, dot, kind = name.rpartition(".")
    block = BLOCK.fullmatch(stem)
    if block is None:
        return table[stem] + dot + kind if stem in table else None
    if t5 != stem.startswith("enc.") or block[2] not in table:
        return None
    prefix = "encoder.block" if t5 else "model.layers"
    return f"{prefix}.{block[1]}.{table[block[2]]}{dot}{kind}"


def unpermute_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(rows, …) of a Llama query or key weight back to the original order of its rows.

    llama.cpp interleaves the two halves of each head for its rotary kernel
    (`LlamaModel.permute` in `convert_hf_to_gguf.py`). Rows are moved whole, so blocks stay blocks.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
