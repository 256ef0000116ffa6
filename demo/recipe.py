"""The training recipe of the model that ships: scenes in, two networks' checkpoints out.

Six stages, each resumable on its own: the VAE's decoder, its encoder, the flow model with its text
encoder, a second flow model that learns the first one's guided velocity, so that it needs no CFG,
and a third that learns, in two rounds, the straight way to the second one's pictures, so that it
needs few steps. The VAE does not wait for the flow models, since the latents that bind them are a
closed form.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..distill.guidance import GuidanceTask
from ..distill.loop import Budget, Task, load_checkpoint, train
from ..distill.model import FlowModel
from ..distill.reflow import Mend, ReflowTask
from ..distill.teacher import TeacherConfig, TeacherTask
from ..host import modules
from .captions import VOCABULARY, Caption, draw_captions, spoken
from .evaluate import LATENT
from .export import PRESET
from .latents import LatentCode
from .nearest import nearest_places
from .prompts import tokenize
from .scenes import draw, render
from .vae import DECODER_GAIN, VAETask

# Share of a budget in minutes, and samples per sample of the flow model's, that each stage gets.
STAGES = {
    "decoder": (0.15, 0.07),
    "encoder": (0.04, 0.02),
    "teacher": (0.46, 1.0),
    "guided": (0.10, 0.12),
    "reflow": (0.12, 0.13),
    "reflow2": (0.13, 0.13),
}
GUIDANCE = 3.0  # the scale of CFG that the model that ships has learned by heart
PAIRS = 192  # batches of noise and picture that reflow learns from
# What a training batch holds, in equal parts: the plainest sentence twice.
MIXTURE = ("single", "single", "pair", "count")


def vocabulary() -> set[int]:
    """The CLIP token ids of every word that a caption may hold."""
    return {token for word in VOCABULARY for token in modules.token_ids(word)}


def training_batch(
    code: LatentCode, batch: int, index: int, encoders: int = 1
) -> tuple[Tensor, Tensor]:
    """Batch number `index`: latents (batch, 16, 16, 16) and prompts (batch, encoders, 77)."""
    captions, rng = _training_captions(batch, index)
    tokens = tokenize([spoken(caption, rng) for caption in captions], encoders)
    return code.encode(draw(captions, rng)), tokens


def _training_captions(batch: int, index: int) -> tuple[list[Caption], np.random.Generator]:
    rng = np.random.default_rng((8, index))
    return draw_captions(rng, batch, MIXTURE), rng


def mend_batch(code: LatentCode, latents: Tensor, index: int) -> Tensor:
    """Latents of the right pictures nearest to those made of a `training_batch`'s prompts."""
    captions, _ = _training_captions(len(latents), index)
    return _mended(code, captions, render, latents)


def _mended(code: LatentCode, captions: list[Caption], draw_as, latents: Tensor) -> Tensor:
    pictures = zip(code.decode(latents).numpy(), captions, strict=True)
    return code.encode(draw_as(captions, [nearest_places(*pair) for pair in pictures]))


def reflow_batch(
    code: LatentCode, batch: int, seed: int, index: int, draw_as=render, encoders: int = 1
) -> tuple[Tensor, Mend]:
    """Prompts (batch, encoders, 77), and the way from latents to those of the nearest right
    pictures, drawn by `draw_as`, a function like `render`."""
    rng = np.random.default_rng((9 + seed, index))
    captions = draw_captions(rng, batch, MIXTURE)
    tokens = tokenize([spoken(caption, rng) for caption in captions], encoders)
    return tokens, partial(_mended, code, captions, draw_as)


@cache
def latent_code() -> LatentCode:
    """The map to latents that every stage shares, as `fit_latent_code` made it of the first scenes.

    Kept, since a fit to today's scenes spans the same space by another basis, in which the VAE that
    ships draws a picture's edges wrong (21 dB instead of 37).
    """
    return LatentCode(**load_file(Path(__file__).parent / "latents.safetensors"))


def stage_task(
    stage: str, folder: Path, device: str = "cpu", config: TeacherConfig | None = None
) -> Task:
    """The task of one of STAGES for `distill.loop.train`, as it starts.

    Raises: FileNotFoundError where `folder` lacks the stage that this one starts from.
    """
    config, code = config or TeacherConfig(), latent_code()
    torch.manual_seed(0)
    data = partial(training_batch, code, config.batch)
    if stage == "teacher":
        return TeacherTask(config, vocabulary(), data, device)
    if stage == "guided":
        return GuidanceTask(config, _earlier(folder, "teacher", config), GUIDANCE, data, device)
    if stage in ("reflow", "reflow2"):
        first = stage == "reflow"
        rates = {"muon_rate": config.muon_rate / 2, "adam_rate": config.adam_rate / 2}
        config = replace(config, **rates, warmup=min(config.warmup, 20), ema=0.99, seed=1 - first)
        teacher = _earlier(folder, "guided" if first else "reflow", config)
        data = partial(reflow_batch, code, config.batch, config.seed)
        return ReflowTask(config, teacher, LATENT, PRESET.sigmas(), data, PAIRS, device)
    network = modules.build_taesd(DECODER_GAIN).get_submodule(f"taesd_{stage}")
    return VAETask(stage, network, code, device, config.compiled)


def _earlier(folder: Path, stage: str, config: TeacherConfig) -> FlowModel:
    path = folder / f"{stage}.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train the stage {stage} first")
    return load_flow_model(path, config)


def train_stages(
    folder: Path,
    stages: Iterable[str],
    minutes: float | None = None,
    samples: int | None = None,
    device: str = "cpu",
    config: TeacherConfig | None = None,
) -> None:
    """Train stages to the end of their share of the budget; what `folder` holds is gone on from."""
    stages = tuple(stages)
    whole = sum(STAGES[stage][0] for stage in stages)
    for stage in stages:
        by_time, by_samples = STAGES[stage]
        if minutes is not None:
            budget = Budget(minutes=minutes * by_time / whole)
        else:
            budget = Budget(samples=int(samples * by_samples))
        train(stage_task(stage, folder, device, config), folder / f"{stage}.pt", budget)


def load_flow_model(path: Path, config: TeacherConfig | None = None) -> FlowModel:
    """The averaged weights of a flow model's checkpoint, for sampling and export."""
    model = FlowModel(config or TeacherConfig(), vocabulary())
    model.load_state_dict(load_checkpoint(path)["task"]["ema"])
    return model.eval().requires_grad_(False)


def load_vae(folder: Path) -> torch.nn.Module:
    """The TAESD whose halves `folder` holds; a half not trained yet keeps its first weights."""
    vae = modules.build_taesd(DECODER_GAIN)
    for half in ("decoder", "encoder"):
        path = folder / f"{half}.pt"
        if path.exists():
            network = load_checkpoint(path)["task"]["network"]
            vae.get_submodule(f"taesd_{half}").load_state_dict(network)
    return vae.eval().requires_grad_(False)
