"""What a training gives to the graph: progress with a preview, and what it learned when stopped."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

log = logging.getLogger(__name__)

KEPT = "loras/fewstep_stopped"  # file below the output folder


class Progress:
    """The node's bar; `latents`, in the model's space, show a picture on it."""

    def __init__(self, patcher, steps: int):
        self.bar, self.steps = comfy.utils.ProgressBar(steps), steps
        # none, unless the host shows previews at all
        self.previewer = latent_preview.get_previewer(
            patcher.load_device, patcher.model.latent_format
        )

    def __call__(self, done: int, latents: Tensor | None = None) -> None:
        picture = None
        if latents is not None and self.previewer is not None:
            picture = self.previewer.decode_latent_to_preview_image("JPEG", latents)
        self.bar.update_absolute(done, self.steps, picture)


def sketched(model) -> bool:
    """Whether the host knows how to sketch a BaseModel's latents; the log says so if not."""
    form = model.latent_format
    if form.latent_rgb_factors is None:
        log.info("ComfyUI has no sketch of %s latents: none are drawn.", type(form).__name__)
    return form.latent_rgb_factors is not None


def sketch(model, latents: Tensor) -> np.ndarray:
    """The first of `latents`, in a BaseModel's space, as the host sketches a latent: (h, w, 3)
    uint8, a pixel for each place of the latent. For a model that is `sketched`.
    """
    form = model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(
        form.latent_rgb_factors, form.latent_rgb_factors_bias, form.latent_rgb_factors_reshape
    )
    return np.asarray(previewer.decode_latent_to_preview(latents))


def lora_model(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The host's LORA_MODEL: as its own training node gives it, in bfloat16."""
    return {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in weights.items()}


def save_lora(weights: dict[str, Tensor], path: Path) -> None:
    save_whole(lora_model(weights), path)


def save_whole(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """Write a safetensors file beside its place, then rename it there: never half a file."""
    temporary = path.with_suffix(".tmp")
    try:
        # not save_file, whose files only their owner may read
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_stopped(weights: dict[str, Tensor], steps: int) -> Path:
    """Below the output folder; the name says the steps, as the stock Save LoRA node's does."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        f"{KEPT}_{steps}_steps", folder_paths.get_output_directory()
    )
    path = Path(folder) / f"{name}_{counter:05}_.safetensors"
    save_lora(weights, path)
    return path


@contextmanager
def kept_if_stopped(kept: Callable[[], tuple[int, dict[str, Tensor]]]) -> Iterator[None]:
    """If what is inside does not come to its end, the LoRA of so many steps, as `kept` gives them,
    is saved.
    """
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished and (so_far := kept())[0]:
            steps, weights = so_far
            path = _save_stopped(weights, steps)
            log.warning("Training stopped after %d steps: the LoRA so far is %s.", steps, path)
