"""What a model file holds and what memory it will take here, told without reading its weights.

A diffusion model is put together by the host over the mapped file, which reads nothing; then the
host's own functions say what it weighs and what sampling takes. A VAE is small enough to be loaded.
"""

import math
import os
import textwrap
from dataclasses import dataclass

import comfy.model_management as management
import comfy.sd
import torch

from ..flow import Preset
from ..quant.compare import field_lines, fields_of, inspect
from ..quant.report import size_text
from . import files, loading
from .layout import is_gguf
from .ops import gguf_ops


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: on the device, were all of them there. unpacked: the largest weight as
    floats, which each layer makes in turn. working: what a step or a decoding takes besides."""

    device: torch.device
    weights: int
    unpacked: int = 0
    working: int = 0

    def line(self) -> str:
        """'weights 1.9 GB + the largest unpacked 18 MB + working memory 0.4 GB = 2.3 GB'"""
        parts = {
            "weights": self.weights,
            "the largest unpacked": self.unpacked,
            "working memory": self.working,
        }
        sums = " + ".join(f"{part} {size_text(size)}" for part, size in parts.items() if size)
        return f"{sums} = {size_text(sum(parts.values()))}"

    def verdict(self, free: int, total: int) -> str:
        """Does it fit? `free`, `total`: bytes of the device, the latter less what the host keeps
        back for other programs."""
        bare = self.unpacked + self.working
        needed = self.weights + bare
        room = f"{size_text(free)} of {size_text(total)} are free on {self.device}"
        if needed <= free:
            return f"fits: {room}"
        if needed <= total:
            return f"fits once other models are unloaded: {room}"
        short = size_text(needed - total)
        if bare > total:
            return f"does not fit: even without weights {size_text(bare - total)} too much: {room}"
        if self.device.type == "cpu":
            return f"does not fit: {short} too much: {room}; a smaller type would help"
        return (
            f"fits in part: {short} of its weights stay in main memory and travel to the device "
            f"in each step, which is slower: {room}"
        )


def preflight(path: str, width: int, height: int, batch: int = 1) -> str:
    """The report on a file, for people. width, height: of the picture in pixels.

    Raises: ValueError (GGUFError) naming the file and the remedy.
    """
    state_dict, metadata = files.read(path)
    state_dict = files.rename_text_encoder(path, state_dict, metadata)
    kind = files.kind_of(state_dict)
    if kind is None:
        raise files.wrong_kind(path, state_dict, metadata, "diffusion model")
    report = inspect(path)
    report.title = f"{os.path.basename(path)}: {kind}, {report.architecture}"
    if kind == "diffusion model":
        report.notes += wrapped(schedule_line(loading.preset_of(path, metadata)))
    memory = _MEMORY[kind](path, state_dict, metadata, (width, height, batch))
    drawing = f" for {width} x {height}, batch {batch}" if memory.working else ""
    report.notes += wrapped(f"memory{drawing}: {memory.line()}")
    report.notes += wrapped(memory.verdict(*room_on(memory.device)))
    report.notes += ["", *field_lines(fields_of(path))]
    return report.text(summary_first=True)


def wrapped(line: str) -> list[str]:
    """`line` as lines that the node shows whole at its usual width."""
    return textwrap.wrap(line, 74, subsequent_indent="  ")


def schedule_line(preset: Preset | None) -> str:
    """The few-step schedule that a file carries."""
    if preset is None:
        return "schedule: the file names none; choose a preset where it is sampled"
    steps = f"{preset.label}, {preset.steps} steps, {preset.rule}, CFG {preset.cfg:g}"
    if preset.formula == "flux2":
        return f"schedule: {steps}, sigmas from the picture's size"
    return f"schedule: {steps}, {' '.join(f'{sigma:.4g}' for sigma in preset.sigmas().tolist())}"


def room_on(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes, without what the host keeps back for other programs on a GPU."""
    kept = 0 if management.is_device_cpu(device) else management.extra_reserved_memory()
    free, total = management.get_free_memory(device), management.get_total_memory(device)
    return int(free - kept), int(total - kept)


def model_memory(path: str, state_dict: dict, metadata, picture: tuple[int, int, int]) -> Memory:
    """Of a diffusion model that draws `picture` (width, height, how many) at CFG 1."""
    model = comfy.sd.load_diffusion_model_state_dict(
        state_dict,
        model_options={"custom_operations": gguf_ops(path)},
        metadata=loading.texts(metadata),
    )
    network = model.model
    weights, unpacked = model.model_size(), 0
    quantised = [p for p in network.diffusion_model.parameters() if is_gguf(p)]
    if quantised:
        unpacked = max(p.numel() for p in quantised) * network.get_dtype_inference().itemsize
    elif files.is_safetensors(path) and network.model_config.quant_config is None:
        # The host's own loader casts these; what was put together here has the file's types.
        tensors = network.diffusion_model.state_dict().values()
        weights -= management.module_size(network.diffusion_model)
        weights += sum(tensor.numel() for tensor in tensors) * network.get_dtype().itemsize
    shape = latent_shape(network.latent_format, *picture)
    return Memory(model.load_device, weights, unpacked, int(network.memory_required(shape)))


def latent_shape(latent_format, width: int, height: int, batch: int) -> tuple[int, ...]:
    """A LATENT's shape for pictures of so many pixels; one frame, where the model draws videos."""
    ratio = latent_format.spacial_downscale_ratio
    sides = (math.ceil(height / ratio), math.ceil(width / ratio))
    frames = (1,) * (latent_format.latent_dimensions - 2)
    return batch, latent_format.latent_channels, *frames, *sides


def vae_memory(path: str, _state_dict: dict, _metadata, picture: tuple[int, int, int]) -> Memory:
    """Of a VAE that decodes `picture`; it works on one at a time, if need be."""
    vae, (width, height, _) = loading.load_vae(path), picture
    sides = (math.ceil(side / vae.spacial_compression_decode()) for side in (height, width))
    shape = (1, vae.latent_channels, *(1,) * (vae.latent_dim - 2), *sides)
    working = int(vae.memory_used_decode(shape, vae.vae_dtype))
    return Memory(vae.patcher.load_device, vae.patcher.model_size(), 0, working)


def encoder_memory(path: str, state_dict: dict, _metadata, _picture) -> Memory:
    """Of a text encoder: the few words of a prompt take next to no working memory."""
    weights = sum(tensor.nbytes for tensor in state_dict.values())
    return Memory(management.text_encoder_device(), weights)


_MEMORY = {
    "diffusion model": model_memory,
    "VAE": vae_memory,
    "text encoder": encoder_memory,
}
