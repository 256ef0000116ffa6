"""The miniature as a data set for `python -m distill`: scenes to learn, sheets, and scores."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from ..distill.model import FlowModel, ModelConfig
from ..distill.reflow import Mend
from ..flow import Preset, preset_from_metadata
from ..host import modules
from ..host.loading import load_diffusion_model
from ..quant import GGUFFile
from . import categories, recipe
from .captions import KINDS, draw_captions
from .evaluate import contact_sheet, draw_pictures, drawn
from .export import FILES, NAME, write_mmdit
from .export import export as write_files
from .ladder import Pictures
from .prompts import PIECES
from .proof import prove
from .shipped import MODELS, load_shipped, read_weights
from .styles import STYLES

SHOWN = 20  # pictures of a sheet


class Miniature:
    """See `distill.dataset.Dataset`. The VAE is the shipped one, below `models`."""

    def __init__(self, models: Path = MODELS):
        self.code = recipe.latent_code()
        self.vocabulary = sorted(recipe.vocabulary())
        words = [piece.removeprefix("▁") for piece in PIECES]
        self.widths = [1, 1, 1, *(len(modules.token_ids(word)) for word in words[3:])]
        self.vae = modules.build_taesd(recipe.DECODER_GAIN).eval().requires_grad_(False)
        self.vae.load_state_dict(read_weights(models / FILES["vae"]))
        self.models = models

    def shipped(self, name: str, config: ModelConfig) -> tuple[FlowModel, Preset]:
        model, _ = load_shipped(self.models, config, tuple(self.vocabulary), name)
        file = GGUFFile((self.models / FILES["mmdit"]).with_stem(name))
        return model, preset_from_metadata(file.metadata)

    def batch(self, size: int, encoders: int, index: int) -> tuple[Tensor, Tensor]:
        return recipe.training_batch(self.code, size, index, encoders)

    def mended(self, latents: Tensor, index: int) -> Tensor:
        return recipe.mend_batch(self.code, latents, index)

    def styled(self, style: str, size: int, encoders: int, index: int) -> tuple[Tensor, Mend]:
        if style not in STYLES:
            raise ValueError(f"style is {style!r}, expected one of {', '.join(STYLES)}")
        return recipe.reflow_batch(self.code, size, 0, index, STYLES[style], encoders)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (n, 3, 128, 128) about [0, 1] of model-space latents (n, 16, 16, 16)."""
        return self.vae.taesd_decoder(latents * recipe.DECODER_GAIN)

    def sheet(
        self, model: FlowModel, sigmas: Tensor, cfg: float, encoders: str = "no t5"
    ) -> np.ndarray:
        rng = np.random.default_rng(3)
        prompts = [str(draw_captions(rng, 1, (KINDS[i % 3],), True)[0]) for i in range(SHOWN)]
        return contact_sheet(
            list(draw_pictures(model, self.decode, prompts, sigmas, cfg, encoders=encoders))
        )

    def evaluate(
        self,
        model: FlowModel,
        sigmas: Tensor,
        cfg: float,
        captions: int,
        encoders: str,
        choosing: bool = False,
    ) -> dict[str, float]:
        """`demo.categories` on captions kept out of training, and "seconds" for a picture here."""
        seed, start = 1_000_001 if choosing else 1, time.perf_counter()
        wanted = categories.held_out(captions, seed)
        options = {"sigmas": sigmas, "cfg": cfg, "encoders": encoders}
        pictures = drawn(partial(draw_pictures, model, self.decode, **options), wanted, seed)
        seconds = (time.perf_counter() - start) / captions
        scores = categories.judge(wanted, np.stack(pictures), self.vae.taesd_encoder)
        return scores | {"seconds": seconds}

    def quantised(self, model: FlowModel, recipe: str) -> FlowModel:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantised.gguf"
            write_mmdit(model.mmdit, path, {}, recipe)
            model.mmdit.load_state_dict(read_weights(path))
        return model

    def export(
        self, model: FlowModel, preset: Preset, folder: Path, recipe: str, file: str | None
    ) -> list[Path]:
        return write_files(model, self.vae, model.config, folder, preset, recipe, file or NAME)

    def prove(self, name: str, steps: Sequence[int], captions: int) -> Iterator[dict]:
        return prove(self.models, name, steps, captions)

    def through_host(
        self, folders: Sequence[Path], turns: int, pictures: int
    ) -> list[list[tuple[float, float]]]:
        """Alternately by each folder's files, after a run that has the host load them: text,
        sampling and VAE as a graph has."""
        prompt, makers, models = "a red circle on a blue background", [], []
        for folder in folders:
            makers.append(Pictures(folder))
            models.append(load_diffusion_model(str(folder / FILES["mmdit"])))
        seconds: list[list[tuple[float, float]]] = [[] for _ in folders]
        for turn in range(turns):
            for maker, model, taken in zip(makers, models, seconds, strict=True):
                maker.draw(model, [prompt], seed=turn, copies=pictures)
                start = time.perf_counter()
                maker.draw(model, [prompt], seed=turn, copies=pictures)
                taken.append((time.perf_counter() - start, maker.sampled_in))
        return seconds
