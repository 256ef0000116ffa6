"""Muon where bfloat16 would be emulated.

torch's Muon makes each update orthogonal in bfloat16, which a CPU without its instructions takes a
hundred times as long for as for float32. There this one computes it in float32, from the same
formula, and keeps the same state.

Source: Jordan et al. 2024 (Muon, https://kellerjordan.github.io/posts/muon/); Liu et al. 2025
(arXiv 2502.16982) for the size of update.
"""

import torch
from torch import Tensor

from ..host.cpu import multiplies_bfloat16


class Muon(torch.optim.Muon):
    """torch.optim.Muon, its updates of the size of AdamW's."""

    def __init__(self, *args, **options):
        super().__init__(*args, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure=None):
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if multiplies_bfloat16() or any(weight.device.type != "cpu" for weight in weights):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict) -> None:
        state, momentum, gradient = self.state[weight], group["momentum"], weight.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(mean, momentum) if group["nesterov"] else mean
        update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-0.2 * max(weight.shape) ** 0.5 * group["lr"])


def orthogonal(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The matrix with all singular values near 1, by a quintic Newton-Schulz iteration, in its
    dtype."""
    a, b, c = coefficients
    tall = len(matrix) > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
