"""What every trainer here does to weights: optimizers, one update, the running average."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..host.cpu import multiplies_bfloat16
from .muon import Muon

# Matrices that learn by Muon: attention and MLPs of the MMDiT and of the text models.
HIDDEN = (".attn.", ".mlp.f", "encoder.layers", "SelfAttention.", "DenseReluDense.")

Adam = Callable[..., torch.optim.Optimizer]  # AdamW, or another that takes its arguments

# Of bitsandbytes: 8-bit moments, and such as may lie in the CPU's memory.
EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
ADAMS = ("adamw", *EIGHT_BIT)


def autocast(device: torch.device) -> torch.autocast:
    """Products in bfloat16, but float32 on a CPU that would have to emulate it, hundreds of times
    as slowly.
    """
    fast = device.type != "cpu" or multiplies_bfloat16()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def adam_of(name: str) -> Adam:
    """One of ADAMS. Raises: ValueError for another name, or where bitsandbytes is missing."""
    if name not in ADAMS:
        raise ValueError(f"optimizer is {name!r}: expected one of {', '.join(ADAMS)}")
    if name not in EIGHT_BIT:
        return torch.optim.AdamW
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"optimizer {name} needs the package bitsandbytes: pip install bitsandbytes, or take "
            "adamw"
        )
    return getattr(importlib.import_module("bitsandbytes.optim"), EIGHT_BIT[name])


def moments(name: str) -> int:
    """Bytes that one of ADAMS keeps for a number that learns."""
    return 2 if name in EIGHT_BIT else 8


class Rates(Protocol):
    """The fields of a trainer's configuration that `build_optimizers` reads."""

    muon_rate: float  # scaled to AdamW's size of update; 0 leaves all to AdamW
    adam_rate: float
    decay: float


def build_optimizers(
    model: nn.Module,
    rates: Rates,
    hidden_parts: Iterable[str] = HIDDEN,
    adam: Adam = torch.optim.AdamW,
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices whose name has one of `hidden_parts`, `adam` for all else.

    "peak" of a parameter group is its rate on the plateau.
    """
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = parameter.ndim == 2 and any(part in f".{name}" for part in hidden_parts)
            (hidden if inside and rates.muon_rate else rest).append(parameter)
    optimizers = []
    if hidden:
        groups = [{"params": hidden, "peak": rates.muon_rate}]
        optimizers.append(Muon(groups, lr=rates.muon_rate, weight_decay=rates.decay))
    if rest:
        groups = [{"params": rest, "peak": rates.adam_rate}]
        optimizers.append(adam(groups, lr=rates.adam_rate, betas=(0.9, 0.98), weight_decay=0.0))
    return optimizers


def set_rates(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Give every parameter group this share of its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


def restore(optimizers: Iterable[torch.optim.Optimizer], states: Iterable[dict]) -> None:
    """Go on from the optimizers' states; the rates are those that they have now."""
    for optimizer, state in zip(optimizers, states, strict=True):
        peaks = [group["peak"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak


def update(loss: Tensor, optimizers: Iterable[torch.optim.Optimizer], clip: float) -> Tensor:
    """One step down the gradient of `loss`, its norm clipped; the norm before that. None is made
    down a gradient that is not finite.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    norm = nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
    if norm.isfinite():
        for optimizer in optimizers:
            optimizer.step()
    return norm


@torch.no_grad()
def average(ema: Mapping[str, Tensor], state: Mapping[str, Tensor], decay: float) -> None:
    """Move an average of weights towards `state`, in place: ema ← decay·ema + (1 − decay)·state."""
    for name, value in ema.items():
        if value.is_floating_point():
            value.lerp_(state[name].to(value.dtype), 1 - decay)


def warm(decay: float, index: int) -> float:
    """An average's decay at step `index` of a model that starts far from where it goes."""
    return min(decay, (index + 1) / (index + 10))
