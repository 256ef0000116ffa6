"""GGUF and safetensors files into ComfyUI's MODEL, CLIP and VAE, by ComfyUI's own loaders."""

import logging
import os
import re
from functools import partial

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ..flow import preset_from_metadata
from . import t5, vocabulary
from .convolutions import use_fast_convolutions
from .cpu import channels_last, may_choose_for_vae, use_fast_kernels, vae_dtype, wants_float32
from .files import (
    adopt_fp8,
    check_finite,
    is_diffusion_model,
    is_safetensors,
    read,
    rename_text_encoder,
    wrong_kind,
)
from .heap import keep_freed_memory
from .hooks import take_hooks
from .layout import dense, is_gguf
from .lora import take_loras
from .ops import gguf_ops
from .residency import budget_of, stay_resident
from .runtime import EXACT, choose

log = logging.getLogger(__name__)

PRESET = "fewstep"  # the attachment of a MODEL that holds its checkpoint's Preset
TEXT_CONFIG = "fewstep.text_encoder."
WRITE_AGAIN = "Write the file again with the sizes that the encoder has."
MOST_ENCODERS = 4  # in one CLIP of the host
CLIP_TYPES = sorted((t.name.lower() for t in comfy.sd.CLIPType), key=lambda name: name != "sd3")


def load_diffusion_model(
    path: str,
    memory: str = "low",
    runtime: str = EXACT,
    disable_dynamic: bool = False,
):
    """-> MODEL, a stock `ModelPatcher` that carries the checkpoint's `Preset`, if the file has one.

    memory: one of `residency.CHOICES`, how much of it dequantised weights may keep. runtime: one of
    `runtime.CHOICES`, what a GGUF file's weights are turned into, where the machine has that.
    Raises: ValueError (GGUFError) naming the file and the remedy.
    """
    state_dict, metadata = read(path)
    if not is_diffusion_model(state_dict):
        raise wrong_kind(path, state_dict, metadata, "diffusion model")
    preset = preset_of(path, metadata)
    budget, operations = budget_of(memory), None
    turning, why_not = choose(runtime, comfy.model_management.get_torch_device())
    if not is_safetensors(path):
        operations = gguf_ops(path, wants_float32(), budget=budget, runtime=turning)
    log.info("Loading %s: %s", os.path.basename(path), summary(state_dict))
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict,
        model_options={"custom_operations": operations},
        metadata=texts(metadata),
        disable_dynamic=disable_dynamic,
    )
    if operations is not None:
        operations.gguf_file.check_complete()
        if why_not:
            log.warning("%s: %s", os.path.basename(path), why_not)
        if turning:
            log.info("%s: %s", os.path.basename(path), turning)
        take_loras(model)
        take_hooks(model)
        stay_resident(model, operations.gguf_residency)
        use_fast_kernels(model)
        keep_freed_memory(model)
    t5.take_alone(model.model)
    model.cached_patcher_init = (load_diffusion_model, (path, memory, runtime))
    if preset is not None:
        model.set_attachments(PRESET, preset)
    return model


def load_text_encoders(
    paths: list[str],
    clip_type: str = "sd3",
    cpu: bool = False,
    embedding_directory: list[str] | None = None,
    disable_dynamic: bool = False,
):
    """One to four files, in any order -> CLIP of the host's `clip_type` ("sd3", "flux", …).

    Raises: ValueError (GGUFError) naming the file and the remedy.
    """
    if clip_type.lower() not in CLIP_TYPES:
        known = ", ".join(CLIP_TYPES)
        raise ValueError(f"there is no clip type {clip_type}: expected one of {known}")
    if not 1 <= len(paths) <= MOST_ENCODERS:
        raise ValueError(f"{len(paths)} text encoders: expected one to {MOST_ENCODERS}")
    state_dicts, options, operations, cut_t5 = [], {}, None, None
    for path in paths:
        state_dict, metadata = read(path)
        state_dict = rename_text_encoder(path, state_dict, metadata)
        vocabulary.spread(path, state_dict, metadata)
        state_dict, metadata = comfy.utils.convert_old_quants(state_dict, metadata=metadata)
        if t5.is_cut(state_dict):
            options["t5xxl_model_config"] = t5.sizes(path, state_dict)
            t5.mark(path, state_dict)
            cut_t5 = state_dict
        if comfy.sd.detect_te_model(state_dict) is None:
            raise wrong_kind(path, state_dict, metadata, "text encoder")
        log.info("Loading %s: %s", os.path.basename(path), summary(state_dict))
        options.update(_encoder_config(path, state_dict, metadata))
        state_dicts.append(state_dict)
    if not all(map(is_safetensors, paths)):
        for path, state_dict in zip(paths, state_dicts, strict=True):
            adopt_fp8(path, state_dict)
        names = ", ".join(map(os.path.basename, paths))
        operations = gguf_ops(names, wants_float32(text_encoder=True), text_encoder=True)
        options["custom_operations"] = operations
    if cpu:
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip = comfy.sd.load_text_encoder_state_dicts(
        state_dicts,
        embedding_directory=embedding_directory,
        clip_type=comfy.sd.CLIPType[clip_type.upper()],
        model_options=options,
        disable_dynamic=disable_dynamic,
    )
    if cut_t5 is not None:
        t5.use_vocabulary(clip, cut_t5)
    if operations is not None:
        operations.gguf_file.check_complete()
        take_loras(clip.patcher)
        take_hooks(clip.patcher)
        stay_resident(clip.patcher, operations.gguf_residency)
    again = (paths, clip_type, cpu, embedding_directory)
    clip.patcher.cached_patcher_init = (_text_encoder_patcher, again)
    return clip


def _text_encoder_patcher(*args, disable_dynamic=False):
    return load_text_encoders(*args, disable_dynamic=disable_dynamic).patcher


def load_vae(path: str):
    """-> VAE. A VAE is small and its convolutions run often, so its weights are dequantised. On a
    CPU with bfloat16 it computes in that (`cpu.vae_dtype`), if the host knows that it can; on
    others its convolutions run faster than the host's.

    Raises: ValueError (GGUFError) naming the file and the remedy.
    """
    state_dict, metadata = read(path)
    weights = {name: dense(tensor) for name, tensor in state_dict.items()}
    for name, tensor in weights.items():
        check_finite(path, name, tensor)
    dtype = vae_dtype()
    vae = _host_vae(path, sd=dict(weights), metadata=texts(metadata), dtype=dtype)
    if vae.first_stage_model is None:
        raise wrong_kind(path, state_dict, metadata, "VAE")
    if dtype in vae.working_dtypes:
        channels_last(vae.first_stage_model)
    elif dtype is not None:  # such as of sound; the host knows only of one that it has built
        vae = _host_vae(path, sd=weights, metadata=texts(metadata))
    if may_choose_for_vae() and vae.vae_dtype == torch.float32:
        use_fast_convolutions(vae.first_stage_model)
    return vae


def _host_vae(path: str, **given):
    """The host's VAE. Raises: ValueError for a file that does not fit it."""

    class Checked(comfy.sd.VAE):
        """The host only logs what of its network a file lacks."""

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "first_stage_model" and value is not None:
                value.register_load_state_dict_post_hook(partial(_check_whole, path))

    try:
        return Checked(**given)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no VAE that this ComfyUI can build: get another file "
            f"({type(error).__name__}: {said[:300]})"
        ) from error


def _check_whole(path: str, network: torch.nn.Module, found) -> None:
    """Called with what loading a VAE's weights found. A file without an encoder still decodes, but
    a part must be whole. Buffers have values of their own.

    Raises: ValueError naming the first missing tensor.
    """
    lacking = set(found.missing_keys)
    parameters = [name for name, _ in network.named_parameters()]
    missing = [name for name in parameters if name in lacking]
    begun = {_part(name) for name in parameters if name not in lacking}
    for name in missing:
        if _part(name) in begun:
            raise ValueError(f"{path} lacks the tensor {name} of a VAE: download it again")
    for part in {_part(name) for name in missing if _part(name).endswith("encoder")}:
        network.get_submodule(part).register_forward_pre_hook(partial(_refuse_to_encode, path))


def _part(name: str) -> str:
    """Of a VAE, to which a tensor belongs: 'decoder', 'vae.encoder'."""
    found = re.match(r".*coder(?=\.)", name)
    return found[0] if found else name.split(".")[0]


def _refuse_to_encode(path: str, *_):
    raise ValueError(f"{path} holds no encoder: get a VAE file that has one")


def summary(state_dict: dict[str, torch.Tensor]) -> str:
    """'412 tensors, 2.1 GB: 300 Q6_K, 112 float32' for the log."""
    counts, size = {}, 0
    for tensor in state_dict.values():
        label = tensor.params.qtype.name if is_gguf(tensor) else str(tensor.dtype).split(".")[1]
        counts[label] = counts.get(label, 0) + 1
        size += tensor.nbytes
    types = ", ".join(f"{n} {label}" for label, n in sorted(counts.items(), key=lambda c: -c[1]))
    return f"{len(state_dict)} tensors, {size / 1e9:.2f} GB: {types}"


def texts(metadata) -> dict[str, str]:
    """What the host understands of a file's metadata: a safetensors header's text. GGUF's own keys
    all have a dot, and some are long lists that are better left unread.
    """
    keys = metadata if isinstance(metadata, dict) else [key for key in metadata if "." not in key]
    return {key: metadata[key] for key in keys if isinstance(metadata[key], str)}


def preset_of(path, metadata):
    try:
        return preset_from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _encoder_config(path, state_dict, metadata) -> dict:
    """Sizes that a file declares of itself, where they differ from the published encoders'.

    The host reads a CLIP's sizes from `model_config` (`text_encoders/long_clipl.py`) and a T5's
    from `t5xxl_model_config` (`sd1_clip.SDClipModel`).
    """
    start = len(TEXT_CONFIG)
    keys = [key for key in metadata if key.startswith(TEXT_CONFIG) and key != vocabulary.IDS]
    sizes = {key[start:]: metadata[key] for key in keys}
    if not sizes:
        return {}
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {TEXT_CONFIG}{key} is {value!r}, not a size. {WRITE_AGAIN}")
    if sizes.get("hidden_size", 0) % sizes.get("num_attention_heads", 1):
        raise ValueError(f"{path}: {TEXT_CONFIG}*: heads do not divide the width. {WRITE_AGAIN}")
    is_t5 = any(name.startswith("encoder.block.") for name in state_dict)
    return {"t5xxl_model_config" if is_t5 else "model_config": sizes}
