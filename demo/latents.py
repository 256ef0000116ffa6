"""Latents in closed form: a fixed linear map of each 8×8 patch of pixels, made before any training.

The 16 leading principal components of the scenes' patches, partly whitened so that edges (rare, of
little variance) are not drowned by the noise that colours (most of the variance) outlive. So the
diffusion model needs no trained VAE to learn from; the VAE that ships learns this map afterwards.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .captions import KINDS, draw_captions
from .scenes import draw

PATCH = 8  # pixels, the side of the patch behind one latent
CHANNELS = 16
WHITENING = 0.5  # 0 leaves the components' deviations as they are, 1 makes them all equal


@dataclass(frozen=True)
class LatentCode:
    """`latent = conv2d(picture, weight, bias, stride=8)`: weight (16, 3, 8, 8), bias (16,)."""

    weight: Tensor
    bias: Tensor

    def encode(self, pictures: Tensor) -> Tensor:
        """(n, 3, h, w) in [0, 1] to (n, 16, h/8, w/8) of zero mean and unit variance overall."""
        return torch.nn.functional.conv2d(pictures, self.weight, self.bias, stride=PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        """The nearest pictures (n, 3, 8h, 8w) to latents (n, 16, h, w), by least squares."""
        back = torch.linalg.pinv(self.weight.flatten(1)).T.reshape(self.weight.shape)
        centred = latents - self.bias[:, None, None]
        return torch.nn.functional.conv_transpose2d(centred, back, stride=PATCH)


def fit_latent_code(seed: int = 0, scenes: int = 2048) -> LatentCode:
    """Principal components of the patches of `scenes` pictures of training captions."""
    rng = np.random.default_rng(seed)
    total, square, count = 0, 0, 0
    for _ in range(0, scenes, 128):
        pictures = draw(draw_captions(rng, 128, KINDS), rng)
        patches = torch.nn.functional.unfold(pictures, PATCH, stride=PATCH)
        patches = patches.transpose(1, 2).reshape(-1, 3 * PATCH * PATCH).double()
        total, square = total + patches.sum(0), square + patches.T @ patches
        count += len(patches)
    mean = total / count
    variance, basis = torch.linalg.eigh(square / count - mean[:, None] * mean)
    variance, basis = variance.flip(0)[:CHANNELS], basis.flip(1)[:, :CHANNELS].T
    # The sign of an eigenvector is arbitrary: its largest entry is made positive.
    peak = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    deviation = variance.sqrt() ** (1 - WHITENING)
    scale = deviation / variance.sqrt() / deviation.square().mean().sqrt()
    rows = basis * peak.sign() * scale[:, None]
    weight = rows.reshape(CHANNELS, 3, PATCH, PATCH).float()
    return LatentCode(weight, (-rows @ mean).float())
