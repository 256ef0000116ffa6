"""The shipped model at 16, 8, 6 and 4 bits by recipe: what each costs, scored and side by side.

Each file is written by `quant`, loaded and sampled by the host as a user's graph would, from the
same noise; `python -m demo quantise` makes the page and the picture in docs/ of it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..flow import preset_from_metadata
from ..host import comparing, sampling
from ..host.loading import load_diffusion_model, load_text_encoders, load_vae
from ..host.text import encode
from ..quant import GGUFFile
from ..quant.convert import convert
from ..quant.plan import make_plan
from ..quant.recipes import recipe_named
from ..quant.report import Report, size_text
from ..quant.sources import open_source
from .captions import KINDS, Caption, draw_captions
from .evaluate import LATENT, contact_sheet, score_captions
from .export import FILES
from .score import rates

RECIPES = ("flash-16", "flash-8", "flash-6", "flash-4")
SHOWN = 8  # captions of each kind in the picture
GAP = 4  # white pixels between a recipe's rows and the next's


class Pictures:
    """The shipped encoder and VAE, and what a model draws with them through the host, as the file
    `path` says that it is sampled; by default the one that ships.
    """

    sampled_in = 0.0  # seconds that the last sampling took

    def __init__(self, models: Path, path: Path | None = None):
        self.clip = load_text_encoders([str(models / FILES["text"])])
        self.vae = load_vae(str(models / FILES["vae"]))
        self.preset = preset_from_metadata(GGUFFile(path or models / FILES["mmdit"]).metadata)

    def latents(
        self,
        model,
        prompts: Sequence[str],
        seed: int = 0,
        steps: int | None = None,
        copies: int = 1,
    ) -> dict:
        """LATENT of a picture of each prompt, or of `copies`, in `steps` or the file's own number
        of them.
        """
        preset, positive = self.preset, self._conditioning(prompts)
        negative = None if preset.cfg == 1 else self._conditioning([""] * len(prompts))
        empty = {"samples": torch.zeros(copies * len(prompts), *LATENT)}
        sampler = sampling.make_sampler(sampling.AUTO_RULE, preset)
        start = time.perf_counter()
        drawn = sampling.sample(
            model, positive, negative, empty, seed, preset.cfg, sampler, preset.sigmas(steps)
        )
        self.sampled_in = time.perf_counter() - start
        return drawn

    def _conditioning(self, prompts: Sequence[str]) -> list:
        """CONDITIONING of as many pictures as prompts."""
        told = [encode(self.clip, prompt, preset=self.preset)[0] for prompt in prompts]
        pooled = torch.cat([extra["pooled_output"] for _, extra in told])
        return [[torch.cat([cond for cond, _ in told]), {"pooled_output": pooled}]]

    @torch.no_grad()
    def draw(self, model, prompts: Sequence[str], **how) -> np.ndarray:
        """(n, height, width, 3) uint8; `how` as for `latents`."""
        return as_bytes(self.vae.decode(self.latents(model, prompts, **how)["samples"]))


@dataclass(frozen=True)
class Rung:
    """One recipe: its report, how close its pictures are, and the share that is right by kind."""

    recipe: str
    report: Report
    compared: comparing.Comparison
    right: dict[str, float]
    shown: np.ndarray


def climb(models: Path, folder: Path, captions: int) -> tuple[list[Rung], np.ndarray]:
    """Each recipe of RECIPES on the model below `models`, written into `folder`; and the shipped
    model's own pictures. captions: of each kind, kept from training, to score."""
    source = models / FILES["mmdit"]
    pictures = Pictures(models)
    prompts = [str(caption) for caption in shown_captions()]
    original = pictures.latents(load_diffusion_model(str(source)), prompts)
    rungs = []
    for recipe in RECIPES:
        path = folder / f"{source.stem}-{recipe}.gguf"
        report = convert(make_plan(open_source(source), recipe_named(recipe)), path)
        report.title, report.seconds = f"{recipe}: {recipe_named(recipe).about}", None
        model = load_diffusion_model(str(path))
        latents = pictures.latents(model, prompts)
        compared = comparing.compare(original, latents, pictures.vae)
        draw = partial(pictures.draw, model)
        right = {
            kind: float(rates(score_captions(draw, captions, kind)[2])["right"]) for kind in KINDS
        }
        rungs.append(Rung(recipe, report, compared, right, halves(compared)[1]))
    return rungs, halves(rungs[0].compared)[0]


def shown_captions() -> list[Caption]:
    """The captions of the picture, kept from training: a row of each kind."""
    rng = np.random.default_rng(0)
    return [caption for kind in KINDS for caption in draw_captions(rng, SHOWN, (kind,), True)]


def halves(compared: comparing.Comparison) -> tuple[np.ndarray, np.ndarray]:
    """The original's and the other's pictures, uint8."""
    left, right = compared.picture.chunk(2, dim=2)
    return as_bytes(left), as_bytes(right)


def as_bytes(pictures: torch.Tensor) -> np.ndarray:
    return pictures.clamp(0, 1).mul(255).round().byte().cpu().numpy()


def sheet(original: np.ndarray, rungs: Sequence[Rung]) -> np.ndarray:
    """The shipped model's pictures, then each recipe's below, (h, w, 3) uint8."""
    rows = [contact_sheet(list(shown), SHOWN) for shown in (original, *(r.shown for r in rungs))]
    gap = np.full((GAP, *rows[0].shape[1:]), 255, np.uint8)
    return np.vstack([part for row in rows for part in (row, gap)][:-1])


def page(rungs: Sequence[Rung], captions: int, picture: str) -> str:
    """The page in Markdown. picture: the picture's name beside it."""
    head = ["Recipe", "Size", "Bits a weight", "Relative error", "Latents", "Pictures"]
    head += [f"Right: {kind}" for kind in KINDS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for rung in rungs:
        report, compared = rung.report, rung.compared
        cells = [
            rung.recipe,
            size_text(report.size),
            f"{report.bits:.2f}",
            f"{report.total.relative:.3g}",
            decibels(compared.latents),
            decibels(compared.pictures),
            *(f"{share:.1%}" for share in rung.right.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reports = "\n\n".join(f"```\n{rung.report.text()}\n```" for rung in rungs)
    return _PAGE.format(
        table="\n".join(lines),
        picture=picture,
        order=", ".join(RECIPES),
        captions=captions,
        reports=reports,
    )


def decibels(values: Sequence[float]) -> str:
    """The mean, '31.2 dB'; 'inf dB' where a picture is the same bit for bit."""
    return f"{comparing.mean(values):.1f} dB"


_PAGE = """\
# The demo model at 16, 8, 6 and 4 bits

`python -m demo quantise` makes this page and the picture.

{table}

Relative error: of all weights against the model's file in 16 bits (what ships is flash-6).
Latents, pictures: PSNR against that file's, from the same noise through ComfyUI, the mean
over the pictures below. Right: of {captions} captions of each kind that the model was not trained
on, the share drawn wholly right, in the checkpoint's own number of steps.

![The same captions and noise, drawn by each file]({picture})

From top to bottom three rows each: the file in 16 bits, {order}.

{reports}
"""
