"""Reflow: learn the straight way from each noise to the picture that a teacher makes of it.

A teacher carries noise z along its curved path to a picture; the student learns the straight line

    x = (1 − sigma)·x0 + sigma·z,    loss = ‖model(x, sigma, text) − (z − x0)‖²

between the two, and so needs fewer steps. Each z has one x0, so nothing is averaged to a blur.
Where the true pictures are known by formula, x0 need not carry the teacher's faults: `mend` takes
what the teacher made to the nearest picture that is right.

Source: Liu et al. 2023, "Flow Straight and Fast", arXiv 2209.03003, section 2.2 (2-rectified flow);
starting from pure noise more often is after Lee et al. 2024, arXiv 2405.20320, section 4.1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..flow import sample_euler
from .model import FlowModel
from .optimize import autocast
from .teacher import TeacherConfig, TeacherTask

Mend = Callable[[Tensor], Tensor]


class ReflowTask(TeacherTask):
    """Straighten a frozen teacher, as a task for `distill.loop.train`; the student starts as it.

    `data(index)` gives prompts (n, encoders, 77) and the function that mends the latents, each of
    `shape`, that the teacher makes of them by euler steps along `sigmas`. There are `batches`
    batches of pairs, each made when first needed and kept.
    """

    name = "reflow"
    pure_noise = 0.25  # share of a batch at sigma 1

    def __init__(
        self,
        config: TeacherConfig,
        teacher: FlowModel,
        shape: tuple[int, ...],
        sigmas: Tensor,
        data: Callable[[int], tuple[Tensor, Mend]],
        batches: int,
        device: torch.device | str = "cpu",
    ):
        super().__init__(config, teacher.text.ids.tolist(), data, device)
        self._start_as(teacher)
        self.shape, self.sigmas, self.batches = shape, sigmas.to(self.device), batches
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def _batch(self, index: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        number = index % self.batches
        if number not in self.pairs:
            self.pairs[number] = self._make(number)
        latents, tokens = self.pairs[number]
        noise, sigma = self._noise(number, latents.shape), self._sigma(len(latents), draw)
        sigma[torch.rand(len(sigma), generator=draw) < self.pure_noise] = 1.0
        return latents, tokens, noise, sigma

    def _noise(self, number: int, shape: torch.Size) -> Tensor:
        seed = (self.config.seed + 1) * 2_000_003 + number
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _make(self, number: int) -> tuple[Tensor, Tensor]:
        """Batch `number`: the pictures, mended, that the teacher makes of its noise, and tokens."""
        tokens, mend = self.data(number)
        short = tokens[..., : self.config.short_context].to(self.device)
        noise = self._noise(number, (len(tokens), *self.shape)).to(self.device)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return x - sigma[:, None, None, None] * self.teacher(x, sigma, short).float()

        with autocast(self.device):
            latents = sample_euler(denoise, noise, self.sigmas)
        return mend(latents.cpu()), tokens
