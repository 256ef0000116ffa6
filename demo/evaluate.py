"""Draw held-out captions with a trained model and score them, in plain torch: no server."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..distill.dropout import emptied
from ..distill.model import ABSENT, CLIP, LEFT_OUT, T5, FlowModel
from ..flow import sample_euler
from ..host import modules
from .captions import Caption, draw_captions
from .prompts import tokenize
from .score import Verdict, score

log = logging.getLogger(__name__)

# Some encoder's tokens left out, or zeros in their place.
ENCODERS = ("both", "no t5", "zero t5", "no clip", "zero clip")
LATENT = (16, 16, 16)  # channels, height, width behind 128×128 pixels


def told_by(prompts: Sequence[str], encoders: str = "no t5") -> Tensor:
    """Prompts (n, encoders, 77) that some encoders read: see ENCODERS. Raises: ValueError."""
    if encoders not in ENCODERS:
        raise ValueError(f"encoders is {encoders!r}, expected one of {', '.join(ENCODERS)}")
    missing = {"zero t5": (T5, ABSENT), "zero clip": (CLIP, ABSENT), "no clip": (CLIP, LEFT_OUT)}
    tokens = tokenize(prompts, 1 if encoders == "no t5" else 2)
    if encoders in missing:
        row, value = missing[encoders]
        tokens[:, row] = value
    return tokens


def denoiser(model: FlowModel, prompts: Sequence[str], cfg: float = 1.0, encoders: str = "no t5"):
    """`f(x, sigma) -> denoised` for flow's samplers, conditioned on as many prompts as pictures."""
    device = next(model.parameters()).device
    tokens = told_by(prompts, encoders).to(device)
    told = model.encode(tokens)
    untold = model.encode(emptied(tokens)) if cfg != 1 else None

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        velocity = modules.velocity(model.mmdit, x, sigma, *told)
        if untold is not None:
            velocity = torch.lerp(modules.velocity(model.mmdit, x, sigma, *untold), velocity, cfg)
        return x - sigma[:, None, None, None] * velocity

    return denoise


@torch.no_grad()
def draw_pictures(
    model: FlowModel,
    decoder: nn.Module,
    prompts: Sequence[str],
    sigmas: Tensor,
    cfg: float = 1.0,
    seed: int = 0,
    encoders: str = "no t5",
) -> np.ndarray:
    """Pictures (n, 128, 128, 3) uint8 of prompts, by euler steps along `sigmas`.

    `decoder` takes model-space latents to pixels in [0, 1].
    """
    device = next(model.parameters()).device
    noise = torch.randn(len(prompts), *LATENT, generator=torch.Generator().manual_seed(seed))
    latents = sample_euler(
        denoiser(model, prompts, cfg, encoders), noise.to(device), sigmas.to(device)
    )
    pixels = decoder(latents).clamp(0, 1).mul(255).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def drawn(draw, captions: Sequence[Caption], seed: int, batch: int = 50) -> list[np.ndarray]:
    """What `draw(prompts, seed=…)` makes of the captions, so many at a time; the log says how far
    it is.
    """
    pictures = []
    for start in range(0, len(captions), batch):
        prompts = [str(caption) for caption in captions[start : start + batch]]
        pictures.extend(draw(prompts, seed=seed + start))
        log.info("%d of %d pictures drawn", len(pictures), len(captions))
    return pictures


def score_captions(
    draw, number: int, kind: str, seed: int = 1, held_out: bool = True, batch: int = 50
) -> tuple[list[Caption], list[np.ndarray], list[Verdict]]:
    """Captions of a kind, the pictures that `draw(prompts, seed)` makes of them, and verdicts."""
    captions = draw_captions(np.random.default_rng(seed), number, (kind,), held_out)
    pictures = drawn(draw, captions, seed, batch)
    return captions, pictures, [score(*pair) for pair in zip(pictures, captions, strict=True)]


def contact_sheet(pictures: Sequence[np.ndarray], columns: int = 10) -> np.ndarray:
    """Pictures side by side, (h, w, 3) uint8; missing ones in the last row are gray."""
    blank = np.full_like(pictures[0], 128)
    padded = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [np.hstack(padded[i : i + columns]) for i in range(0, len(padded), columns)]
    return np.vstack(rows)
