"""Guidance distillation: a model that draws in one call a step what its teacher draws in two.

The student starts as the teacher and learns its guided velocity, at one fixed scale w:

    v(x, sigma, text) = u(x, sigma, empty) + w·(u(x, sigma, text) − u(x, sigma, empty))

Source: Meng et al. 2023, "On Distillation of Guided Diffusion Models", arXiv 2210.03142, stage one.
"""

import torch
from torch import Tensor

from .model import FlowModel, empty_prompt
from .teacher import Batch, TeacherConfig, TeacherTask


class GuidanceTask(TeacherTask):
    """Learn a frozen teacher's guided velocity, as a task for `distill.loop.train`.

    `data(index)` gives latents and prompts as it does for TeacherTask.
    """

    name = "guided"

    def __init__(
        self,
        config: TeacherConfig,
        teacher: FlowModel,
        scale: float,
        data: Batch,
        device: torch.device | str = "cpu",
    ):
        super().__init__(config, teacher.text.ids.tolist(), data, device)
        self.scale = scale
        self._start_as(teacher)

    @torch.no_grad()
    def _target(
        self, velocity: Tensor, x: Tensor, sigma: Tensor, tokens: Tensor, known: Tensor
    ) -> Tensor:
        told = self.teacher(x, sigma, tokens, known).float()
        untold = self.teacher(x, sigma, empty_prompt(tokens)).float()
        return torch.lerp(untold, told, self.scale)
