"""Model files as state dicts in the host's terms, and what kind of model they hold."""

import json
import os
import re

import comfy.model_detection
import comfy.sd
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy_kitchen.tensor import get_layout_class
from safetensors import SafetensorError

from ..quant import GGUFError, GGUFFile, dequantize, sniff
from . import names, t5
from .layout import is_gguf, wrap
from .tokenizer import sentencepiece_model

SAFE = (".safetensors", ".sft")
SMALL = 1 << 16  # elements; smaller dense tensors are looked through for NaN while loading
LOADERS = {
    "diffusion model": "FewStep Load Diffusion Model",
    "text encoder": "FewStep Load Text Encoders",
    "VAE": "FewStep Load VAE",
}
VAE_NAME = re.compile(
    r"(first_stage_model\.|vae\.)?(taesd_)?(decoder|encoder)\."
    r"(conv_in|conv_out|mid|mid_block|up|up_blocks|down|down_blocks|conv1|middle|\d+)\."
)


def read(path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """A .gguf or .safetensors file -> (state dict, metadata). Nothing of a GGUF tensor is read yet.

    Raises: GGUFError for a damaged GGUF file; ValueError for any other kind of file.
    """
    if not is_safetensors(path):
        return read_gguf(path)
    try:
        state_dict, header = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except (SafetensorError, ValueError) as error:
        with open(path, "rb") as file:
            head = file.read(32)
        what = "cut short or damaged: download again"
        if head.startswith(b"GGUF"):
            what = "a GGUF file: rename it to .gguf"
        elif head and head[8:9] != b"{":
            what = sniff.describe(head, "it again")
        raise ValueError(f"{path} is no whole safetensors file; it seems to be {what}") from error
    return state_dict, header or {}


def is_safetensors(path: str) -> bool:
    return path.lower().endswith(SAFE)


def read_gguf(path: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights of two or more dimensions stay quantised; the few others are dequantised at once."""
    file = GGUFFile(path)
    state_dict = {}
    for name, info in file.tensors.items():
        if not info.is_quantized:
            tensor = file.tensor(name)
        elif name.endswith(".weight") and len(info.shape) > 1:
            tensor = wrap(file.blocks(name), info.qtype, info.shape)
        else:
            tensor = dequantize(file.blocks(name), info.qtype, info.shape)
        if not is_gguf(tensor) and (tensor.numel() <= SMALL or info.is_quantized):
            check_finite(path, name, tensor)
        state_dict[name] = tensor
    return state_dict, file.metadata


def is_finite(tensor: torch.Tensor) -> bool:
    """torch cannot look into floats of one byte as they are."""
    is_fp8 = tensor.is_floating_point() and tensor.itemsize == 1
    return bool((tensor.float() if is_fp8 else tensor).isfinite().all())


def check_finite(path: str, name: str, tensor: torch.Tensor) -> None:
    """Raises: GGUFError naming file and tensor if a value is NaN or infinite."""
    if not is_finite(tensor):
        raise GGUFError(
            f"{path}: tensor {name} holds NaN or infinity. The file is damaged or was badly "
            "converted: download it again or get another quantisation of it."
        )


def rename_text_encoder(path: str, state_dict: dict, metadata: dict) -> dict[str, torch.Tensor]:
    """A text model with llama.cpp's names -> the host's names; any other state dict as it is."""
    if not names.is_llama_cpp(state_dict):
        return state_dict
    architecture = str(metadata.get("general.architecture"))
    renamed = {}
    for name, tensor in state_dict.items():
        new = names.text_encoder_name(name, architecture)
        if new is None:
            continue
        if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = "head_count_kv" if "attn_k" in name else "head_count"
            tensor = _unpermute(path, name, tensor, metadata.get(f"llama.attention.{heads}"))
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor - 1  # llama.cpp stores 1 + w (`GemmaModel`), the host adds 1 itself
        renamed[new] = tensor
    if architecture.startswith(("t5", "gemma")):
        model = sentencepiece_model(metadata)
        if model is not None:
            renamed["spiece_model"] = model
    return renamed


def _unpermute(path, name, tensor, heads):
    if not isinstance(heads, int) or heads < 1 or len(tensor) % (2 * heads):
        raise GGUFError(
            f"{path}: tensor {name} of {len(tensor)} rows does not fit the file's "
            f"llama.attention.head_count(_kv), which is {heads}. Get a file converted by "
            "llama.cpp's convert_hf_to_gguf.py."
        )
    if not is_gguf(tensor):
        return names.unpermute_rows(tensor, heads)
    blocks = names.unpermute_rows(tensor._qdata, heads)
    return wrap(blocks, tensor.params.qtype, tuple(tensor.shape))


def adopt_fp8(path: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Makes scaled fp8 weights the host's `QuantizedTensor`s, in place, so that such a safetensors
    file can stand beside GGUF files under our operations. (Alone it goes through the host's own.)
    """
    for mark in [name for name in state_dict if name.endswith(".comfy_quant")]:
        layer = mark.removesuffix(".comfy_quant")
        form = json.loads(state_dict.pop(mark).numpy().tobytes())["format"]
        if not form.startswith("float8"):
            raise ValueError(
                f"{path}: {layer} is stored as {form}, which cannot be mixed with GGUF encoders. "
                "Take this encoder as GGUF, fp8, fp16 or bf16."
            )
        weight, scale = state_dict[f"{layer}.weight"], state_dict.pop(f"{layer}.weight_scale")
        state_dict.pop(f"{layer}.input_scale", None)
        layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
        params = get_layout_class(layout).Params(
            scale=scale.float(), orig_dtype=torch.bfloat16, orig_shape=tuple(weight.shape)
        )
        weight = weight.view(QUANT_ALGOS[form]["storage_t"])
        state_dict[f"{layer}.weight"] = QuantizedTensor(weight, layout, params)


def is_diffusion_model(state_dict: dict[str, torch.Tensor]) -> bool:
    """True if the host can place these tensors, with or without a checkpoint's prefix."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    if not any(name.startswith(prefix) for name in state_dict):
        prefix = ""
    return comfy.model_detection.model_config_from_unet(state_dict, prefix) is not None


def kind_of(state_dict: dict[str, torch.Tensor]) -> str | None:
    """What a state dict holds: a key of `LOADERS`, or None where the host cannot tell."""
    if names.is_llama_cpp(state_dict) or t5.is_cut(state_dict):
        return "text encoder"
    if comfy.sd.detect_te_model(state_dict) is not None:
        return "text encoder"
    if is_diffusion_model(state_dict):
        return "diffusion model"
    if any(VAE_NAME.match(name) for name in state_dict):
        return "VAE"
    return None


def wrong_kind(path: str, state_dict: dict, metadata: dict, wanted: str) -> ValueError:
    """The error for a file that does not hold a `wanted` (a key of `LOADERS`)."""
    kind = kind_of(state_dict)
    if kind is not None and kind != wanted:
        return ValueError(f"{path} holds a {kind}, not a {wanted}: load it with '{LOADERS[kind]}'.")
    if not state_dict:
        return ValueError(f"{path} holds no tensors: get another file.")
    tag = metadata.get("general.architecture")
    first = ", ".join(list(state_dict)[:3])
    said = f"architecture tag '{tag}', first tensors {first}"
    if any(".to_q." in name or "transformer_blocks." in name for name in state_dict):
        return ValueError(
            f"{path}: the tensors have diffusers' names ({said}), which ComfyUI cannot place. "
            "Get a GGUF made from the model's original checkpoint, not from its diffusers folder."
        )
    return ValueError(
        f"{os.path.basename(path)}: this ComfyUI does not know such a {wanted} ({said}). "
        "Update ComfyUI if the model is new; otherwise the file is not for image models."
    )
