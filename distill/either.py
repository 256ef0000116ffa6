"""A T5 that learns to be enough: to draw by T5 alone what the same model draws by CLIP-L alone.

What `align` leaves is CLIP-L's other way in, the pooled vector, for which T5's tokens must make up:

    loss = ‖v(x, sigma, T5(text)) − v(x, sigma, CLIP(text))‖²

Only the T5 learns, so that the model, and students of it, draw by CLIP-L as before. The aim holds
none of flow matching's noise: it is the mean of all pictures of a caption, not one of them. Ours.
"""

import torch
from torch import Tensor, nn

from .model import CLIP, LEFT_OUT, T5
from .optimize import autocast
from .teacher import TeacherConfig, TeacherTask, t5_alone


class EitherTask(TeacherTask):
    """As a task for `distill.loop.train`; `data(index)` gives latents and prompts as it does for
    TeacherTask."""

    name = "either"

    def __init__(self, config: TeacherConfig, *args):
        super().__init__(t5_alone(config), *args)

    def _loss(self, index: int, progress: float) -> Tensor:
        draw = torch.Generator().manual_seed(self.config.seed * 1_000_003 + index)
        latents, tokens, noise, sigma = self._batch(index, draw)
        tokens = self._shortened(tokens, index, progress)
        x = torch.lerp(latents, noise, sigma[:, None, None, None])
        x, sigma, tokens = (t.to(self.device) for t in (x, sigma, tokens))
        alone = tokens.clone()
        alone[:, CLIP] = LEFT_OUT
        with autocast(self.device):
            with torch.no_grad():
                aim = self.model(x, sigma, tokens[:, :T5]).float()
            return nn.functional.mse_loss(self.model(x, sigma, alone).float(), aim)
