"""Which model a file holds, told from its tensors' names, and which of its tensors are delicate.

One row an architecture: `tag` is `general.architecture` as city96/ComfyUI-GGUF reads it (a closed
list there; `stable-diffusion.cpp` and FewStep look at names only), `marks` are the names that give
it away, `keep` the parts that meet noise, time, text and pixels, which no recipe quantises.
Source: ComfyUI `comfy/model_detection.py`; city96/ComfyUI-GGUF `tools/convert.py` and
`tools/lcpp.patch`; FACTS on SD3.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .errors import GGUFError


@dataclass(frozen=True)
class Architecture:
    """marks: alternatives, each a set of names that occur together. keep: parts of names.

    exact: float32 in any recipe: parameters that loaders copy as they are.
    kind: `general.type`, where a loader asks for it.
    """

    tag: str
    about: str
    marks: tuple[tuple[str, ...], ...]
    keep: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    kind: str = ""


_UNET_KEEP = ("class_embedding.", "time_embedding.", "add_embedding.", "time_embed.", "label_emb.",
              "conv_in.", "conv_out.", "input_blocks.0.0.", "out.2.")  # fmt: skip
_FLUX_KEEP = ("txt_in.", "img_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.",
              "distilled_guidance_layer.")  # fmt: skip

# In this order: the first whose marks are all there.
ARCHITECTURES = (
    Architecture(
        "sd3",
        "Stable Diffusion 3 and 3.5",
        (("joint_blocks.0.context_block.attn.qkv.weight",),),
        ("final_layer.", "time_text_embed.", "context_embedder.", "t_embedder.", "y_embedder.",
         "x_embedder.", "proj_out.", "pos_embed"),
    ),
    Architecture(
        "qwen_image",
        "Qwen-Image",
        (("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"),),
        ("img_in.", "txt_in.", "time_text_embed.", "norm_out.", "proj_out."),
    ),
    Architecture(
        "hyvid",
        "Hunyuan Video",
        (("txt_in.individual_token_refiner.blocks.0.norm1.weight",),),
        _FLUX_KEEP,
    ),
    Architecture(
        "flux",
        "FLUX.1, FLUX.2, Chroma",
        (("double_blocks.0.img_attn.proj.weight",),),
        _FLUX_KEEP,
    ),
    Architecture(
        "lumina2",
        "Z-Image, Lumina 2",
        (("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"),),
        ("t_embedder.", "x_embedder.", "final_layer.", "cap_embedder.", "context_refiner.",
         "noise_refiner."),
        ("x_pad_token", "cap_pad_token"),
    ),
    Architecture(
        "wan",
        "Wan 2.1 and 2.2",
        (("head.modulation", "blocks.0.self_attn.q.weight"),),
        ("patch_embedding.", "text_embedding.", "time_projection.", "time_embedding.", "img_emb.",
         "head."),
        ("modulation",),
    ),
    Architecture(
        "ltxv",
        "LTX-Video",
        (("adaln_single.emb.timestep_embedder.linear_1.bias",),),
        ("adaln_single.", "caption_projection.", "patchify_proj.", "proj_out."),
        ("scale_shift_table",),
    ),
    Architecture(
        "hidream",
        "HiDream",
        (("caption_projection.0.linear.weight",
          "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight"),),
        ("p_embedder.", "t_embedder.", "x_embedder.", "final_layer.", "caption_projection."),
        (".ff_i.gate.weight", "img_emb.emb_pos"),
    ),
    Architecture(
        "cosmos",
        "Cosmos Predict 2",
        (("blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight"),),
        ("p_embedder.", "t_embedder.", "t_embedding_norm.", "x_embedder.", "final_layer."),
        ("pos_embedder",),
    ),
    Architecture(
        "aura",
        "AuraFlow",
        (("double_layers.0.attn.w1q.weight",),),
        ("t_embedder.", "init_x_linear.", "modF.1.", "cond_seq_linear.", "final_linear."),
        ("register_tokens",),
    ),
    Architecture(
        "sdxl",
        "Stable Diffusion XL",
        (("input_blocks.3.0.op.weight", "input_blocks.6.0.op.weight", "label_emb.0.0.weight"),),
        _UNET_KEEP,
    ),
    Architecture(
        "sd1",
        "Stable Diffusion 1 and 2",
        (("input_blocks.3.0.op.weight", "input_blocks.9.0.op.weight", "out.2.weight"),),
        _UNET_KEEP,
    ),
    Architecture(
        "t5encoder",
        "T5 text encoder",
        (("encoder.block.0.layer.0.SelfAttention.q.weight",), ("enc.blk.0.attn_q.weight",)),
        exact=("relative_attention_bias", "attn_rel_b"),
    ),
    Architecture(
        "clip",
        "CLIP text encoder",
        (("text_model.encoder.layers.0.self_attn.q_proj.weight",),),
        ("text_projection",),
        ("position_embedding",),
        kind="clip-vision",  # of CLIPs, city96's text loader lets only this type pass
    ),
    Architecture(
        "vae",
        "VAE",
        (("decoder.conv_in.weight",), ("decoder.conv1.weight",), ("decoder.1.weight",),
         ("taesd_decoder.1.weight",), ("decoder.layers.0.weight", "encoder.layers.0.weight")),
        ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
    ),
)  # fmt: skip

# What an unknown model's delicate parts are most often called.
UNKNOWN = Architecture(
    "unknown",
    "not recognised",
    (),
    ("embedder.", "embedding.", "embed.", "_in.", "final_layer.", "proj_out.", "conv_out.",
     "head.", "pos_embed", "norm_out."),
)  # fmt: skip

# A checkpoint of several models names each with a prefix.
DIFFUSION_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "net.",
    "model.model.",
    "model.",
)
OTHER_PARTS = {
    "text encoders": ("text_encoders.", "cond_stage_model.", "conditioner."),
    "VAE": ("first_stage_model.", "vae."),
}
# Names that only diffusers' layout has, of models that ComfyUI wants in their original one.
_DIFFUSERS = (
    "transformer_blocks.0.attn.add_q_proj.weight",
    "transformer_blocks.0.attn1.to_q.",
    "single_transformer_blocks.0.",
    "joint_transformer_blocks.0.",
    "down_blocks.0.",
)


def find_architecture(names: Collection[str]) -> Architecture:
    """The architecture of tensors with these names, without prefix; `UNKNOWN` for a new one."""
    names = frozenset(names)
    for row in ARCHITECTURES:
        if any(names.issuperset(marks) for marks in row.marks):
            return row
    return UNKNOWN


def architecture_named(tag: str) -> Architecture:
    """The row of `tag`. Raises: GGUFError with the list of those known."""
    for row in (*ARCHITECTURES, UNKNOWN):
        if row.tag == tag:
            return row
    known = ", ".join(row.tag for row in ARCHITECTURES)
    raise GGUFError(f"no architecture is called {tag!r} (known: {known})")


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether names of no known architecture are diffusers' names of one."""
    return any(name.startswith(_DIFFUSERS) for name in names)


def prefix_of(names: Collection[str]) -> str:
    """What to strip from a checkpoint's names: the diffusion model's prefix, "" for none.

    The long ones belong to checkpoints of several parts; the short ones count only where what is
    left is a known model, since a text encoder's names begin with `model.` too.
    """
    for prefix in DIFFUSION_PREFIXES:
        inner = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if inner and (prefix == DIFFUSION_PREFIXES[0] or find_architecture(inner) is not UNKNOWN):
            return prefix
    return ""
