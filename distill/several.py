"""One training in several processes: on several GPUs, or machines, by Hugging Face's accelerate.

    accelerate launch -m distill trajectory --model FILE …

(On CPUs accelerate's launcher wants MPI; torch's own, `python -m torch.distributed.run
--nproc-per-node N -m distill …`, does without.) Each process has its share of every batch, and
draws its randomness for the whole batch, so that how many there are changes nothing but rounding.
Gradients are averaged by torch's DistributedDataParallel, in which `accelerate` wraps what learns;
the frozen MODEL lies whole in each. Machines need one folder that all of them see.
"""

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


class One:
    """The only process."""

    count, number = 1, 0

    def own(self, batch: Any) -> Any:
        """This process's share of a whole batch: a tensor (n, …) or a list of n."""
        return batch

    def averaging(self, learned: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`loss`, whose backward averages the gradients of `learned` over the processes."""
        return loss

    def mean(self, value: Tensor) -> Tensor:
        """Over the processes."""
        return value

    def first(self) -> AbstractContextManager:
        """Inside, process 0 is through before the others begin."""
        return nullcontext()

    def wait(self) -> None:
        """Until all processes are here."""


ONE = One()


class Accelerated(One):
    """One of several, as `accelerate launch` starts them."""

    def __init__(self, cpu: bool):
        """Raises: ValueError for a way of accelerate's that shards the model."""
        from accelerate import Accelerator, DistributedDataParallelKwargs

        unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # a last block's text
        self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=[unused])
        kind = self.accelerator.distributed_type.value
        if not kind.startswith("MULTI_"):
            raise ValueError(
                f"accelerate is set up for {kind}: a LoRA is small and its MODEL may be quantised, "
                "so processes are of the kind MULTI_GPU or MULTI_CPU. Run `accelerate config` anew"
            )
        self.count, self.number = self.accelerator.num_processes, self.accelerator.process_index

    def own(self, batch: Any) -> Any:
        size = len(batch) // self.count
        return batch[self.number * size : (self.number + 1) * size]

    def averaging(self, learned: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return self.accelerator.prepare_model(_Loss(learned, loss))

    def mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="mean")

    def first(self) -> AbstractContextManager:
        return self.accelerator.main_process_first()

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


class _Loss(nn.Module):
    """A loss as a module whose parameters are what learns, which DistributedDataParallel wants."""

    def __init__(self, learned: nn.Module, loss: Callable[..., Tensor]):
        super().__init__()
        self.learned, self.loss = learned, loss

    def forward(self, *given: Any) -> Tensor:
        return self.loss(*given)


def processes(cpu: bool) -> One:
    """Those that this process was started among. Raises: ValueError where accelerate is missing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ONE
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("several processes need the package accelerate: pip install accelerate")
    return Accelerated(cpu)
