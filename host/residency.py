"""Dequantised weights of one model that stay in memory from step to step, up to a budget.

A step unpacks each weight once, and forgets it. Kept, it need not be unpacked again: on a CPU that
saves about a tenth of a step for two and a half times the memory (a Q6_K weight in bfloat16). Which
weights are kept is settled before each sampling: those that were used most so far come first. The
memory is given back when the host unloads or moves the weight, or the model as a whole; and, where
the budget is what was free ("auto"), as others take it up.
"""

from weakref import WeakKeyDictionary, WeakSet

import comfy.model_management as management
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.quant_ops import QuantizedTensor

GB = 10**9
CHOICES = ["low", "auto", "2 GB", "4 GB", "8 GB", "16 GB", "32 GB"]
SHARE = 8  # of a device's memory, one part in so many stays free


class Residency:
    """What is kept, by module. `budget` is in bytes; None asks for what is free."""

    def __init__(self, budget: int | None = 0):
        self.automatic, self.budget = budget is None, budget or 0
        self.kept, self.uses = WeakKeyDictionary(), WeakKeyDictionary()
        self.refused = WeakSet()

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(weight.nbytes for weight in self.kept.values())

    def dense(self, module: torch.nn.Module, weight: QuantizedTensor) -> torch.Tensor:
        """The module's weight, unpacked to its type; to be read only, as it may be kept."""
        if not self.budget:
            return weight.dequantize()
        kept, (uses, _) = self.kept.get(module), self.uses.get(module, (0, 0))
        self.uses[module] = uses + 1, weight.numel() * weight.dtype.itemsize
        if kept is not None and (kept.dtype, kept.device) == (weight.dtype, weight.device):
            return kept
        self.release(module)
        unpacked = weight.dequantize()
        if module not in self.refused and self.size + unpacked.nbytes <= self.budget:
            self.kept[module] = unpacked
        return unpacked

    def release(self, module: torch.nn.Module) -> None:
        self.kept.pop(module, None)

    def settle(self, patcher) -> None:
        """Host's ON_PRE_RUN callback: chooses anew what may be kept."""
        if self.automatic:
            self.budget = max(0, self.size + spare(patcher))
        room = self.budget
        self.refused.clear()
        for module, (_, size) in sorted(self.uses.items(), key=lambda item: -item[1][0]):
            if size <= room:
                room -= size
            else:
                self.refused.add(module)
                self.release(module)

    def give_back(self, _patcher, unpatch_all: bool) -> None:
        """Host's ON_DETACH callback; `unpatch_all` is False as a clone takes them over."""
        if unpatch_all:
            self.kept.clear()


def spare(patcher) -> int:
    """Bytes that weights may take of the device's free memory. Stays free: what the host keeps for
    computing, a share of the whole; and on a CPU, room for the mapped file in the system's cache.
    """
    device = patcher.load_device
    free, total = management.get_free_memory(device), management.get_total_memory(device)
    mapped = patcher.model_size() if management.is_device_cpu(device) else 0
    return int(free - total / SHARE - management.minimum_inference_memory() - mapped)


def budget_of(choice: str) -> int | None:
    """Bytes of one of CHOICES; None for "auto".

    Raises: ValueError for anything else.
    """
    if choice == "auto":
        return None
    number, _, unit = choice.partition(" ")
    if choice != "low" and not (number.isdecimal() and unit == "GB"):
        raise ValueError(f"memory is {choice!r}: choose low, auto, or a size such as 4 GB")
    return 0 if choice == "low" else int(number) * GB


def stay_resident(patcher, residency: Residency) -> None:
    """Let a freshly loaded MODEL settle before each sampling, and give back when it is unloaded."""
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, __name__, residency.settle)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, __name__, residency.give_back)
