"""What a training gives to the graph: progress with a preview, and what it learned when stopped."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.utils
import folder_paths
import latent_preview
import safetensors.torch
import torch
from torch import Tensor

log = logging.getLogger(__name__)

KEPT = "loras/fewstep_stopped"  # file below the output folder


class Progress:
    """The node's bar; `latents`, in the model's space, show a picture on it."""

    def __init__(self, patcher, steps: int):
        self.bar, self.steps = comfy.utils.ProgressBar(steps), steps
        self.previewer = latent_preview.get_previewer(
            patcher.load_device, patcher.model.latent_format
        )

    def __call__(self, done: int, latents: Tensor | None = None) -> None:
        picture = None
        if latents is not None and self.previewer is not None:
            picture = self.previewer.decode_latent_to_preview_image("JPEG", latents)
        self.bar.update_absolute(done, self.steps, picture)


def lora_model(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The host's LORA_MODEL: as its own training node gives it, in bfloat16."""
    return {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in weights.items()}


def save_lora(weights: dict[str, Tensor], steps: int, prefix: str = KEPT) -> Path:
    """Write a LoRA below the output folder; its name says the steps, as the stock node's does."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        f"{prefix}_{steps}_steps", folder_paths.get_output_directory()
    )
    path = Path(folder) / f"{name}_{counter:05}_.safetensors"
    safetensors.torch.save_file(lora_model(weights), path)
    return path


@contextmanager
def kept_if_stopped(
    weights: Callable[[], dict[str, Tensor]], steps: Callable[[], int]
) -> Iterator[None]:
    """If what is inside does not come to its end, the LoRA of so many steps is saved."""
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished and steps():
            path = save_lora(weights(), steps())
            log.warning("Training stopped after %d steps: the LoRA so far is %s.", steps(), path)
