"""What a run will take of memory, so that it can be said before it starts."""

from .loop import Task
from .model import FlowModel


def memory_needed(task: Task, model: FlowModel, places: int) -> int:
    """Bytes beside the weights that are there already: gradients, the optimizers' moments, and
    what the widest network's backward keeps.

    places: latents of one sample. The latter by Korthikanti et al. 2022, arXiv 2205.05198, eq. 2:
    (34 + 5·heads·tokens / width) bytes for a token, a layer and a unit of width.
    """
    learned = sum(
        parameter.numel()
        for optimizer in _optimizers(task)
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    depth, width = model.config.depth, 64 * model.config.depth
    tokens = places // 4 + 77 * model.config.encoders  # of 2×2 latents, and of the prompt
    kept = (34 + 5 * depth * tokens / width) * tokens * width * depth
    return 3 * 4 * learned + int(task.batch * kept)


def _optimizers(task: Task):
    for name in ("proxy_optimizer", "head_optimizer"):
        if hasattr(task, name):
            yield getattr(task, name)
    yield from task.optimizers
