"""One training in several processes: on several GPUs, or machines, by Hugging Face's accelerate.

    accelerate launch -m distill trajectory --model FILE …

(On CPUs accelerate's launcher wants MPI; torch's own, `python -m torch.distributed.run
--nproc-per-node N -m distill …`, does without.) Each process has its share of every batch, and
draws its randomness for the whole batch, so that how many there are changes nothing but rounding.
Gradients are averaged by torch's DistributedDataParallel. The frozen MODEL lies whole in each, or,
where accelerate is told FSDP (`--use_fsdp`), sharded over all of them (see `host.adapters.shard`);
what learns is small, and always whole. Processes that share weights call the MODEL equally often:
nothing that one of them does depends on what only it has. Machines need one folder that all see.
"""

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel


class One:
    """The only process."""

    count, number = 1, 0
    mesh: DeviceMesh | None = None  # that the frozen MODEL is sharded over

    def own(self, batch: Any) -> Any:
        """This process's share of a whole batch: a tensor (n, …) or a list of n."""
        return batch

    def averaging(self, learned: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`loss`, whose backward averages the gradients of `learned` over the processes."""
        return loss

    def mean(self, value: Tensor) -> Tensor:
        """Over the processes."""
        return value

    def whole(self, share: Tensor) -> Tensor:
        """The batch (n, …) that each process has its share of."""
        return share

    def all(self, holds: bool) -> bool:
        """Whether it holds in every process."""
        return holds

    def first(self) -> AbstractContextManager:
        """Inside, process 0 is through before the others begin."""
        return nullcontext()


ONE = One()


class Accelerated(One):
    """One of several, as `accelerate launch` starts them."""

    def __init__(self, cpu: bool):
        """Raises: ValueError for another way of accelerate's to share work out."""
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=cpu)
        kind = self.accelerator.distributed_type.value
        if kind != "FSDP" and not kind.startswith("MULTI_"):
            raise ValueError(
                f"accelerate is set up for {kind}: expected several GPUs or CPUs, with or without "
                "FSDP. Run `accelerate config` anew"
            )
        self.count, self.number = self.accelerator.num_processes, self.accelerator.process_index
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # not noted by accelerate for CPUs
            self.mesh = init_device_mesh(self.accelerator.device.type, (self.count,))

    def own(self, batch: Any) -> Any:
        size = len(batch) // self.count
        return batch[self.number * size : (self.number + 1) * size]

    def averaging(self, learned: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # a last block's text teaches nothing
        return DistributedDataParallel(_Loss(learned, loss), find_unused_parameters=True)

    def mean(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="mean")

    def whole(self, share: Tensor) -> Tensor:
        return self.accelerator.gather(share)

    def all(self, holds: bool) -> bool:
        return bool(self.mean(torch.tensor(float(holds), device=self.accelerator.device)) == 1)

    def first(self) -> AbstractContextManager:
        return self.accelerator.main_process_first()


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
