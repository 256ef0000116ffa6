"""Stage 3, split-timestep fine-tuning: two branches of one student, merged into one again.

One branch goes on learning the steps that start in (0, 0.5], the other those in (0.5, 1] (a
MatchTask with a `branch` and an average of 0.99 that starts at the student); then their weights are
interpolated. Source: SD3.5-Flash, arXiv 2509.21318, whose ratio is 3:7, chosen by GenEval; which of
the two branches weighs 0.7 is not published, so it is searched.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BRANCHES = {"low": (0.0, 0.5), "high": (0.5, 1.0)}  # sigmas (above, up to) at which steps start
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def merge(low: Mapping[str, Tensor], high: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """(1 − ratio)·low + ratio·high of two networks' weights. Raises: ValueError if they differ."""
    _check_alike(low, high)
    return {
        name: torch.lerp(value, high[name], ratio) if value.is_floating_point() else value
        for name, value in low.items()
    }


def merge_loras(
    low: Mapping[str, Tensor], high: Mapping[str, Tensor], ratio: float
) -> dict[str, Tensor]:
    """The LoRA that changes weights by (1 − ratio)·low + ratio·high, exactly, with the ranks of
    both side by side. Named as `host.adapters` names them, alpha as large as the rank. Of whole
    differences, those between.

    Raises: ValueError if they are of different layers.
    """
    if not any(key.endswith(".alpha") for key in low):
        return merge(low, high, ratio)
    _check_alike(low, high)
    merged = {}
    for name in (key.removesuffix(".alpha") for key in low if key.endswith(".alpha")):
        parts = ((low, 1 - ratio), (high, ratio))
        ups = [share * lora[f"{name}.lora_up.weight"].float() for lora, share in parts]
        downs = [lora[f"{name}.lora_down.weight"].float() for lora, _ in parts]
        merged[f"{name}.lora_up.weight"] = torch.cat(ups, 1)
        merged[f"{name}.lora_down.weight"] = torch.cat(downs)
        merged[f"{name}.alpha"] = torch.tensor(float(len(merged[f"{name}.lora_down.weight"])))
    return merged


def _check_alike(low: Mapping[str, Tensor], high: Mapping[str, Tensor]) -> None:
    if low.keys() != high.keys():
        odd = sorted(low.keys() ^ high.keys())[0]
        raise ValueError(f"only one of the two branches has {odd}: they are of different networks")
