"""Stage 3, split-timestep fine-tuning: two branches of one student, merged into one again.

One branch goes on learning the steps that start in (0, 0.5], the other those in (0.5, 1] (a
MatchTask with a `branch` and an average of 0.99 that starts at the student); then their weights are
interpolated. Source: SD3.5-Flash, arXiv 2509.21318, whose ratio is 3:7, chosen by GenEval; which of
the two branches weighs 0.7 is not published, so it is searched.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def merge(low: Mapping[str, Tensor], high: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """(1 − ratio)·low + ratio·high of two networks' weights. Raises: ValueError if they differ."""
    if low.keys() != high.keys():
        odd = sorted(low.keys() ^ high.keys())[0]
        raise ValueError(f"only one of the two branches has {odd}: they are of different networks")
    return {
        name: torch.lerp(value, high[name], ratio) if value.is_floating_point() else value
        for name, value in low.items()
    }


def search(
    low: Mapping[str, Tensor],
    high: Mapping[str, Tensor],
    score: Callable[[Mapping[str, Tensor]], float],
    ratios: Sequence[float] = RATIOS,
) -> dict[float, float]:
    """The score of every ratio's merge; the best is `max(scores, key=scores.get)`."""
    return {ratio: score(merge(low, high, ratio)) for ratio in ratios}
