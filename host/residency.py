"""Where dequantised weights of one model lie, and which stay there, up to a budget.

A step unpacks each weight once, and forgets it. Kept, it need not be unpacked again, for two and a
half times the memory (a Q6_K weight in bfloat16): some hundredths of a step on a CPU. Which weights
are kept is settled before each sampling: those that were used most so far come first. The memory is
given back when the host unloads or moves the weight, or the model as a whole; and, where the budget
is what was free ("auto"), as others take it up. The host's dynamic VRAM takes a model's memory away
without telling it: "auto" then keeps nothing beyond a sampling.
"""

from threading import get_ident
from weakref import WeakKeyDictionary, WeakSet

import comfy.model_management as management
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.quant_ops import QuantizedTensor

from ..quant import dequantize
from .layout import dense, is_gguf
from .side_branch import SideBranch

GB = 10**9
CHOICES = ["low", "auto", "2 GB", "4 GB", "8 GB", "16 GB", "32 GB"]
NONE = None, None  # is kept of a module
SHARE = 8  # of a device's memory, one part in so many stays free


class Residency:
    """What is kept, by module: the weight, and the SideBranch in it, if any. `budget` is in bytes;
    None asks for what is free.
    """

    def __init__(self, budget: int | None = 0):
        self.automatic, self.budget = budget is None, budget or 0
        self.kept, self.uses = WeakKeyDictionary(), WeakKeyDictionary()
        self.refused = WeakSet()
        self.scratch: dict[int, torch.Tensor] = {}  # of each thread

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(weight.nbytes for weight, _ in self.kept.values())

    def dense(
        self,
        module: torch.nn.Module,
        weight: QuantizedTensor,
        dtype: torch.dtype,
        transient: bool = False,
        branch: SideBranch | None = None,
    ) -> torch.Tensor:
        """The module's weight, unpacked to `dtype`, with the LoRAs of `branch` in it; to be read
        only, as it may be kept. What is `transient` lasts until this thread asks for the next one.
        """
        if not self.budget:
            return self.unpack(weight, dtype, transient, branch)
        (kept, within), (uses, _) = self.kept.get(module, NONE), self.uses.get(module, (0, 0))
        size = weight.numel() * dtype.itemsize
        self.uses[module] = uses + 1, size
        there = kept is not None and (kept.dtype, kept.device) == (dtype, weight.device)
        if there and within is branch:
            return kept
        self.release(module)
        if module in self.refused or self.size + size > self.budget:
            return self.unpack(weight, dtype, transient, branch)
        made = self.unpack(weight, dtype, False, branch)
        self.kept[module] = made, branch
        return made

    def keeps(self, module: torch.nn.Module) -> bool:
        """Whether the module's weight stays unpacked, or may once it is."""
        return self.budget > 0 and module not in self.refused

    def unpack(
        self,
        weight: QuantizedTensor,
        dtype: torch.dtype,
        transient: bool,
        branch: SideBranch | None,
    ) -> torch.Tensor:
        out = self.room(weight, dtype) if transient else None
        if branch is not None:
            return branch.merged(weight, dtype, out)
        if out is None:
            return dense(weight, dtype)
        return dequantize(weight._qdata, weight.params.qtype, weight.shape, out=out)

    def room(self, weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor | None:
        """On a CPU memory that serves one weight after the other: where each takes memory of its
        own, the system fills that with zeros first, which takes longer than unpacking.
        """
        if not (is_gguf(weight) and weight.device.type == "cpu") or torch.compiler.is_compiling():
            return None
        thread, size = get_ident(), weight.numel() * dtype.itemsize
        if thread not in self.scratch or self.scratch[thread].numel() < size:
            self.scratch.pop(thread, None)
            with torch.inference_mode(False):  # so that it can be written to in any mode
                self.scratch[thread] = torch.empty(size, dtype=torch.uint8)
        return self.scratch[thread][:size].view(dtype).view(weight.shape)

    def release(self, module: torch.nn.Module) -> None:
        self.kept.pop(module, None)

    def release_merged(self, module: torch.nn.Module) -> None:
        """Release what is kept with LoRAs in it."""
        if self.kept.get(module, NONE)[1] is not None:
            self.release(module)

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

    def rest(self, patcher) -> None:
        """Host's ON_CLEANUP callback, after sampling."""
        if self.automatic and patcher.is_dynamic():
            self.kept.clear()

    def give_back(self, _patcher, unpatch_all: bool) -> None:
        """Host's ON_DETACH callback; `unpatch_all` is False as a clone takes them over."""
        if unpatch_all:
            self.kept.clear()
            self.scratch.clear()


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
    """Let a freshly loaded MODEL or CLIP's patcher settle before it samples, and give back when it
    is unloaded.
    """
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, __name__, residency.settle)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, __name__, residency.rest)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, __name__, residency.give_back)
