"""What a run asks of its data set; the miniature's is `demo.miniature`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from ..flow import Preset
from .model import FlowModel, ModelConfig
from .reflow import Mend


class Dataset(Protocol):
    """What there is to learn, and how well it was learned."""

    vocabulary: Sequence[int]  # CLIP ids of every word
    widths: Sequence[int]  # CLIP ids for each piece of T5's vocabulary; 1 for special ones

    def batch(self, size: int, encoders: int, index: int) -> tuple[Tensor, Tensor]:
        """Batch number `index`: latents (size, 16, h, w) and prompts (size, encoders, 77)."""

    def mended(self, latents: Tensor, index: int) -> Tensor:
        """Latents of the right pictures nearest to `latents` (size, 16, h, w), made of the prompts
        of batch `index`."""

    def styled(self, style: str, size: int, encoders: int, index: int) -> tuple[Tensor, Mend]:
        """Prompts of batch `index`, and what gives latents of theirs a look. Raises: ValueError."""

    def sheet(
        self, model: FlowModel, sigmas: Tensor, cfg: float, encoders: str = "no t5"
    ) -> np.ndarray:
        """Pictures of a few prompts, always the same, side by side: (h, w, 3) uint8."""

    def shipped(self, name: str, config: ModelConfig) -> tuple[FlowModel, Preset]:
        """The flow model of that name among the GGUF files that ship, and how it is sampled.
        Raises: FileNotFoundError."""

    def evaluate(
        self,
        model: FlowModel,
        sigmas: Tensor,
        cfg: float,
        captions: int,
        encoders: str,
        choosing: bool = False,
    ) -> dict[str, float]:
        """Scores by name, "overall" among them; on other captions and noise where something is
        chosen by them."""

    def quantised(self, model: FlowModel, recipe: str) -> FlowModel:
        """The model as a file of one of quant's recipes holds it."""

    def export(
        self, model: FlowModel, preset: Preset, folder: Path, recipe: str, file: str | None
    ) -> list[Path]:
        """Write the model's GGUF files below `folder`; their paths. `file` is the model's own
        name, None for that of the model that ships."""

    def prove(self, name: str, steps: Sequence[int], captions: int) -> Iterator[dict]:
        """What the file `name` that ships scores through the host: a row for each number of steps
        and each of several scorers."""

    def through_host(
        self, folders: Sequence[Path], turns: int, pictures: int
    ) -> list[list[tuple[float, float]]]:
        """Seconds that each folder's files take for `pictures` at once, and those of them that
        sampling took; loaded and drawn by ComfyUI, in turns."""
