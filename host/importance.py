"""Importance gathered while a MODEL samples: how large each weight's inputs are.

The watcher is a wrapper around the whole sampling, which a MODEL carries by the host's own means
(`WrappersMP.OUTER_SAMPLE`). Its hooks hang on the layers only while that MODEL samples; a clone
without the wrapper shares the layers and sees nothing of them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from comfy.model_management import supports_fp64
from comfy.patcher_extension import WrappersMP

from ..quant.importance import Seen, write_importance
from .quantizing import in_output, output_file

log = logging.getLogger(__name__)

KEY = "fewstep_importance"


class Watcher:
    """What was seen in all samplings of one MODEL, and the file that holds it.

    The file is named when it is first written, and written anew after each sampling.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.path: Path | None = None
        self.seen: dict[str, Seen] = {}
        self.runs = 0

    def __call__(self, executor, *args, **kwargs):
        """The host's wrapper: watch one sampling, add what was seen if it came to its end."""
        model = executor.class_obj.model_patcher.model
        with watching(model.diffusion_model) as sums:
            drawn = executor(*args, **kwargs)
        self.add({name: one.seen() for name, one in sums.items()}, type(model).__name__)
        return drawn

    def add(self, seen: dict[str, Seen], about: str) -> None:
        """Raises: ValueError where the model gave NaN, GGUFError where the file is not writable."""
        bad = [name for name, row in seen.items() if not row.squares.isfinite().all()]
        if bad:
            raise ValueError(
                f"The inputs of {bad[0]} were NaN or infinite in this sampling, so nothing was "
                "added to the importance file. Find out why the picture is black first."
            )
        for name, row in seen.items():
            self.seen[name] = self.seen[name] + row if name in self.seen else row
        self.runs += 1
        self.path = self.path or output_file(self.prefix)
        write_importance(self.path, self.seen, self.runs, about)
        log.info("%s: %d weights, %d samplings", in_output(self.path), len(self.seen), self.runs)


class _Inputs:
    """The inputs of one layer, summed where they are; nothing waits for a GPU meanwhile."""

    def __init__(self):
        self.squares: torch.Tensor | None = None
        self.tokens = 0

    def __call__(self, _module, args, kwargs) -> None:
        """torch's forward pre-hook. The first argument: (…, cols)"""
        x = (args[0] if args else kwargs["input"]).detach()
        leading = tuple(range(x.dim() - 1))  # none of a single vector, whose norms are its sizes
        norms = x.float()
        if leading:
            norms = torch.linalg.vector_norm(x, dim=leading, dtype=torch.float32)
        squares = (norms.double() if supports_fp64(x.device) else norms).square()
        self.squares = squares if self.squares is None else self.squares + squares
        self.tokens += x.numel() // x.shape[-1]

    def seen(self) -> Seen:
        return Seen(self.squares.cpu().double(), self.tokens)


@contextmanager
def watching(network: torch.nn.Module) -> Iterator[dict[str, _Inputs]]:
    """Sums by the name of the weight, of those that ran until the end of the `with`."""
    sums: dict[str, _Inputs] = {}
    hooks = []
    for name, module in network.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, torch.nn.Embedding):
            continue
        sums[f"{name}.weight"] = inputs = _Inputs()
        hooks.append(module.register_forward_pre_hook(inputs, with_kwargs=True))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for name in [name for name, inputs in sums.items() if not inputs.tokens]:
            del sums[name]


def watch(model, prefix: str):
    """A clone of MODEL whose samplings are watched and written below the output folder."""
    output_file(prefix)  # a bad prefix is told here, not after the sampling
    watched = model.clone()
    watched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, Watcher(prefix))
    return watched
