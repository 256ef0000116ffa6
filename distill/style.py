"""A style LoRA for a few-step student: the same pictures, drawn another way.

Each noise z has one picture that the student makes of it, and that one another look x0. What is
learned is the straight way between the two, at the student's own noise levels alone:

    x = (1 − s_i)·x0 + s_i·z,    loss = ‖v(x, s_i, text) − (z − x0)‖²

so that as few steps as before draw it. Ours, after reflow (see `reflow`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flow import sample_euler
from .backbone import TEACHER
from .student import Sample, StudentConfig, StudentTask, per_sample


@dataclass(frozen=True)
class StyleConfig(StudentConfig):
    style: str = ""  # as the data set names it
    rank: int = 8
    adam_rate: float = 2e-3
    batches: int = 48  # of noise and picture; then they are seen again, each time at another step

    def __post_init__(self):
        """Raises: ValueError for no rank: a style is a LoRA."""
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: a style is a LoRA, of a rank of 1 or more")


class StyleTask(StudentTask):
    """A style as a task for `distill.loop.train`; the backbone's teacher is the student it is for.

    `data(index)` gives prompts and the function that gives latents of theirs another look; `shape`
    is one picture's latents'.
    """

    name = "style"

    def __init__(self, config: StyleConfig, *args, shape: tuple[int, ...], **kwargs):
        super().__init__(config, *args, **kwargs)
        self.shape = shape
        self.pairs: dict[int, Sample] = {}

    def _sample(self, index: int, draw: torch.Generator) -> Sample:
        number = index % self.config.batches
        if number not in self.pairs:
            self.pairs[number] = self._pair(number)
        return self.pairs[number]

    @torch.no_grad()
    def _pair(self, number: int) -> Sample:
        """Batch `number`: noise, and the picture that the student makes of it, in the new look."""
        prompts, restyle = self.data(number)
        draw = torch.Generator().manual_seed((self.config.seed + 1) * 2_000_003 + number)
        told, untold = self.backbone.read(prompts, self.config, draw)
        noise = torch.randn(self.config.batch, *self.shape, generator=draw).to(self.device)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return x - per_sample(sigma, x) * self._velocity(TEACHER, x, sigma, told)

        drawn = sample_euler(denoise, noise, self.sigmas.to(self.device))
        return Sample(restyle(drawn.cpu()).to(self.device), noise, told, untold)

    def _loss(self, index: int, sample: Sample, draw: torch.Generator) -> Tensor:
        i = torch.randint(len(self.sigmas) - 1, (len(sample.noise),), generator=draw)
        sigma = self.sigmas[i].to(sample.noise)
        x = torch.lerp(sample.latents, sample.noise, per_sample(sigma, sample.noise))
        made = self._velocity(self.student, x, sigma, sample.told)
        return nn.functional.mse_loss(made, sample.noise - sample.latents)
