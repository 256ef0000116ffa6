"""How noisy a student's gradient is: the batch at which noise and signal are equal.

The simple noise scale of McCandlish et al. 2018, arXiv 1812.06162, eq. 2.9: B = tr(Σ) / |G|², with
Σ the covariance of one sample's gradient and G its mean, both estimated without bias from several
batches (their appendix A). In samples: a batch much smaller than B learns mostly from noise.
"""

import torch

from .match import MatchTask


def noise_scale(task: MatchTask, step: int, batches: int) -> float:
    """B of the student's step number `step`, in samples, from so many batches; inf where the
    gradient's mean is lost in its noise. Nothing is trained.
    """
    learned = [p for p in task.student.parameters() if p.requires_grad]
    place = task.config.steps().index(step)
    total, squares = None, 0.0
    for number in range(batches):
        index = place + number * len(task.config.steps())
        draw = torch.Generator().manual_seed(7 * index + 1)
        loss = task._loss(index, task._sample(index, draw), draw)
        parts = torch.autograd.grad(loss, learned, allow_unused=True)
        gradient = torch.cat([part.flatten() for part in parts if part is not None])
        total = gradient if total is None else total + gradient
        squares += gradient.square().sum().item()
    mean = (total / batches).square().sum().item()
    spread = (squares - batches * mean) / (batches - 1)  # tr(Σ) / batch
    signal = mean - spread / batches  # |G|²
    return task.batch * spread / signal if signal > 0 else float("inf")
