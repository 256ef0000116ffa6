"""The VAE that ships: a 16-channel TAESD that learns to read and to draw the closed-form latents.

The encoder regresses the latents from pixels. The decoder draws sharp pictures from latents to
which noise was added, so that it snaps what a diffusion model leaves slightly wrong to flat colours
and clean edges. Both are convolutional and learn from 64×64 crops.
"""

import numpy as np
import torch
from torch import Tensor, nn

from ..distill.optimize import autocast, update
from .captions import KINDS, draw_captions
from .latents import PATCH, LatentCode
from .scenes import SIZE, draw

CROP = 64  # pixels
CANDIDATES = 3  # crops looked at for each one taken
DECODER_GAIN = 0.4  # keeps the strongest edges' latents inside TAESD's clamp at ±3
NOISE = 0.15  # the largest deviation of the noise on the decoder's latents
LEARNING_RATE = 1.5e-3


def crops(number: int, seed: int, index: int, held_out: bool = False) -> Tensor:
    """Pictures (number, 3, 64, 64) float32 in [0, 1], cut out of scenes along 8-pixel lines.

    Of a scene's random crops the one with most contrast is taken: there is more to learn in it.
    """
    rng = np.random.default_rng((seed, index))
    pictures = draw(draw_captions(rng, number, KINDS, held_out), rng)
    corners = rng.integers((SIZE - CROP) // PATCH + 1, size=(number, CANDIDATES, 2)) * PATCH
    cut = []
    for picture, places in zip(pictures, corners, strict=True):
        candidates = [picture[:, y : y + CROP, x : x + CROP] for y, x in places]
        cut.append(max(candidates, key=lambda crop: crop.std((1, 2)).sum()))
    return torch.stack(cut)


def gradient_difference(drawn: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels' differences: punishes blur and speckle."""
    return sum((drawn.diff(dim=d) - truth.diff(dim=d)).abs().mean() for d in (2, 3))


class VAETask:
    """Train one half of a TAESD, `part` "decoder" or "encoder", for `distill.loop.train`."""

    batch = 16

    def __init__(
        self, part: str, network: nn.Module, code: LatentCode, device="cpu", compiled=False
    ):
        self.name, self.device = f"vae {part}", torch.device(device)
        self.part, self.network, self.code = part, network.to(self.device), code
        self.network.to(memory_format=torch.channels_last)
        if compiled:
            self.network.compile(dynamic=False)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0)

    def step(self, index: int, progress: float) -> Tensor:
        pictures = crops(self.batch, 11, index)
        latents = self.code.encode(pictures) * DECODER_GAIN
        generator = torch.Generator().manual_seed(index)
        if self.part == "decoder":
            sigma = NOISE * DECODER_GAIN * torch.rand(self.batch, 1, 1, 1, generator=generator)
            latents += sigma * torch.randn(latents.shape, generator=generator)
        pictures, latents = pictures.to(self.device), latents.to(self.device)
        with autocast(self.device):
            made = self.network(latents if self.part == "decoder" else pictures).float()
        if self.part == "decoder":
            loss = nn.functional.mse_loss(made, pictures) * 4 + nn.functional.l1_loss(
                made, pictures
            )
            loss = loss + 0.5 * gradient_difference(made, pictures)
        else:
            loss = nn.functional.mse_loss(made, latents)
        rate = LEARNING_RATE * min((index + 1) / 50, 1.0) * (0.5 + 0.5 * np.cos(np.pi * progress))
        self.optimizer.param_groups[0]["lr"] = float(rate)
        update(loss, [self.optimizer], 1.0)
        return loss.detach()

    def state_dict(self) -> dict:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def psnr(drawn: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    return -10 * (drawn.clamp(0, 1) - truth).square().mean().log10().item()
