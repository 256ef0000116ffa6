"""GenEval's six categories on the demo's captions, by the exact scorer, and a Fréchet distance.

| Category | Captions | Right are |
|---|---|---|
| single object | single | number and shape |
| two objects | pair | number and both shapes |
| counting | count | number and shape |
| colours | single | number, shape and colour |
| position | pair | number, both shapes, and where they lie |
| attribute binding | pair | number, both shapes, each in its own colour |

GenEval asks nothing of a background; here "background" and "right" (everything at once, the
background too) stand beside it. "overall" is the mean of the six, as there.
Source: Ghosh et al. 2023, arXiv 2310.11513, section 3.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy import linalg
from torch import Tensor, nn

from .captions import KINDS, Caption, draw_captions
from .scenes import draw
from .score import Verdict, score

Check = Callable[[Verdict], bool]
CATEGORIES: Mapping[str, tuple[str, Check]] = {
    "single object": ("single", lambda v: v.count and v.shape),
    "two objects": ("pair", lambda v: v.count and v.shape),
    "counting": ("count", lambda v: v.count and v.shape),
    "colours": ("single", lambda v: v.count and v.shape and v.colour),
    "position": ("pair", lambda v: v.count and v.shape and v.position),
    "attribute binding": ("pair", lambda v: v.count and v.shape and v.colour),
}


def held_out(number: int, seed: int = 1) -> list[Caption]:
    """Captions kept out of training, as many of each kind, give or take one."""
    rng = np.random.default_rng(seed)
    kinds = [KINDS[i % len(KINDS)] for i in range(number)]
    return [draw_captions(rng, 1, (kind,), held_out=True)[0] for kind in kinds]


def categories(captions: Sequence[Caption], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of right pictures in each category, "overall", "background" and "right".

    Raises: ValueError if there is no caption of some kind.
    """
    shares = {}
    for name, (kind, check) in CATEGORIES.items():
        seen = [check(v) for c, v in zip(captions, verdicts, strict=True) if c.kind == kind]
        if not seen:
            raise ValueError(f"there is no caption of the kind {kind} to tell {name} by")
        shares[name] = float(np.mean(seen))
    shares["overall"] = float(np.mean(list(shares.values())))
    shares["background"] = float(np.mean([v.background for v in verdicts]))
    shares["right"] = float(np.mean([v.right for v in verdicts]))
    return shares


@torch.no_grad()
def features(encoder: nn.Sequential, pictures: Tensor) -> np.ndarray:
    """(n, 128): mean and deviation over space of what the VAE's encoder sees in pictures.

    pictures (n, 3, 128, 128) in [0, 1]; seen are the 64 channels before the last convolution.
    """
    trunk = nn.Sequential(*list(encoder)[:-1])
    seen = torch.cat([trunk(part) for part in pictures.split(50)])
    return torch.cat([seen.mean((2, 3)), seen.std((2, 3))], 1).double().numpy()


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two clouds of features (n, d): |μ1 − μ2|² + tr(Σ1 + Σ2 − 2·√(Σ1 Σ2)).

    Source: Heusel et al. 2017, arXiv 1706.08500, eq. 6. The root's trace is taken from the
    eigenvalues of Σ1 Σ2, which are those of a positive matrix.
    """
    mean = first.mean(0) - second.mean(0)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    roots = np.sqrt(linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0))
    traces = sum(np.trace(covariance) for covariance in covariances)
    return float(mean @ mean + traces - 2 * roots.sum())


def truth(captions: Sequence[Caption], seed: int = 2) -> Tensor:
    """Scenes of the captions as they are drawn for training: (n, 3, 128, 128) in [0, 1]."""
    return draw(captions, np.random.default_rng(seed))


def judge(
    captions: Sequence[Caption], pictures: np.ndarray, encoder: nn.Sequential
) -> dict[str, float]:
    """Every score of pictures (n, 128, 128, 3) uint8 of as many captions."""
    verdicts = [score(*pair) for pair in zip(pictures, captions, strict=True)]
    drawn = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    distance = frechet(features(encoder, drawn), features(encoder, truth(captions)))
    return categories(captions, verdicts) | {"frechet": distance}
