"""A LoRA on every linear layer: weight + (alpha / rank)·B·A, of which A and B alone are learned.

It is torch's own parametrisation of `weight`, so that a network's code does not change.
Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """weight (out, in) to weight + scale·up·down; `up` starts at zero, so nothing changes yet."""

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        out, inside = weight.shape
        self.down = nn.Parameter(torch.randn(rank, inside, device=weight.device) * inside**-0.5)
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def add_lora(network: nn.Module, rank: int, alpha: float | None = None) -> nn.Module:
    """Freeze a network but for a new LoRA on each of its linear layers; alpha defaults to rank."""
    network.requires_grad_(False)
    for layer in [layer for layer in network.modules() if isinstance(layer, nn.Linear)]:
        low = LowRank(layer.weight, min(rank, *layer.weight.shape), alpha or rank)
        parametrize.register_parametrization(layer, "weight", low)
        layer.parametrizations.weight.original.requires_grad_(False)
    return network


def effective(network: nn.Module, name: str) -> Tensor:
    """A tensor by its name in the network without LoRA, what a LoRA adds to it included."""
    module, _, leaf = name.rpartition(".")
    return getattr(network.get_submodule(module), leaf)


def as_file(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A LoRA's tensors, by their names in the network, as ComfyUI's LoRA loaders name them.

    float16: "diffusion_model.LAYER.lora_down.weight" (rank, in), ".lora_up.weight" (out, rank), and
    ".alpha" (), which is what `add_lora` was given as `rank`.
    """
    tensors = {}
    for name, value in state.items():
        layer, _, part = name.partition(".parametrizations.weight.0.")
        tensors[f"diffusion_model.{layer}.lora_{part}.weight"] = value.half().contiguous()
        tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(rank))
    return tensors
