"""Two LATENTs drawn from one noise by two checkpoints: how far apart, and how they look."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Comparison:
    """One entry a picture, in dB, infinite where nothing differs. picture: IMAGE, the original on
    the left, the other on the right."""

    latents: list[float]
    pictures: list[float]
    picture: torch.Tensor

    def text(self) -> str:
        """A line a picture, and the means."""
        pairs = enumerate(zip(self.latents, self.pictures, strict=True), 1)
        rows = [f"picture {n}: latents {a:.1f} dB, decoded {b:.1f} dB" for n, (a, b) in pairs]
        means = f"mean: latents {mean(self.latents):.1f} dB, decoded {mean(self.pictures):.1f} dB"
        return "\n".join([*rows, means, "PSNR; more is closer, inf is the same"])


@torch.no_grad()
def compare(original: dict, other: dict, vae) -> Comparison:
    """Two LATENTs and the VAE that decodes both.

    The peak of a latent's PSNR is the range of the original's values, of a picture's 1.
    Raises: ValueError for latents of different shapes.
    """
    first, second = original["samples"], other["samples"]
    if first.shape != second.shape:
        raise ValueError(
            f"The latents have different shapes, {tuple(first.shape)} and {tuple(second.shape)}: "
            "draw both in the same size and number, from the same seed."
        )
    pictures = [vae.decode(samples).float().cpu().clamp(0, 1) for samples in (first, second)]
    frames = [each.reshape(-1, *each.shape[-3:]) for each in pictures]  # of videos
    return Comparison(
        latents=[psnr(a, b, float(a.max() - a.min())) for a, b in zip(first, second, strict=True)],
        pictures=[psnr(a, b, 1.0) for a, b in zip(*pictures, strict=True)],
        picture=torch.cat(frames, dim=2),
    )


def psnr(original: torch.Tensor, other: torch.Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(peak² / mean squared difference).

    NaN where a value is NaN or infinite, -inf where the original is all of one value.
    """
    error = float((original.double() - other.double()).square().mean())
    if not math.isfinite(error):
        return math.nan
    if not error:
        return math.inf
    return 10 * math.log10(peak**2 / error) if peak else -math.inf


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
