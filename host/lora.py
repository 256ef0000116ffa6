"""How the stock LoRA loaders' patches reach a linear layer of ours, whichever way the host loads.

* Its dynamic VRAM hangs a `LowVramPatch` on `weight_lowvram_function`; so does partial loading, on
  `weight_function`. Both hold the patches as they were loaded: see `ops.py`, `waiting_patch`.
* Where it loads a module fully, it would write the sum of weight and LoRA in the weight's place,
  but passes over modules that say they are patched already. Ours say so, and an ON_LOAD callback
  then hands them their patches.

A module's patches become a side branch, which `ops.py` computes or, where that is less work, merges
into the unpacked weight; those that cannot are left to the host, which keeps the patched weight
dense. LoRA hooks join them on their way: see `hooks.py`.
"""

import logging

import torch
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP
from comfy.quant_ops import QuantizedTensor

from .side_branch import SideBranch, side_branch

log = logging.getLogger(__name__)

NAMED = 8  # weights that a line of the log names
REMEMBERED = 4  # sets of LoRAs on a weight: hooks make conditionings take turns


def same(known: list, patches: list) -> bool:
    """Whether two lists of patches hold the same tensors at the same strengths."""
    return len(known) == len(patches) and all(
        a is b or (a[1] is b[1] and (a[0], *a[2:]) == (b[0], *b[2:]))
        for a, b in zip(known, patches, strict=True)
    )


class TakesLoRA:
    """Mixin for a linear operation, see `ops.py`."""

    written, unloaded, branches = False, False, ()  # branches: of the last few sets of LoRAs

    def side_branch(self, waiting: LowVramPatch | None) -> SideBranch | None:
        """Waiting LoRAs as computed beside the weight; None if there are none, or dense ones."""
        if waiting is None:
            return None
        patches = waiting.patches[waiting.key]
        for known, branch in self.branches:
            if same(known, patches):
                return branch
        branch = side_branch(patches, tuple(self.weight.shape))
        self.branches = ((patches[:], branch), *self.branches[: REMEMBERED - 1])
        return branch

    def forget_loras(self) -> None:
        """Let go of what was made for the last LoRAs."""
        self.branches = ()
        self.gguf_residency.release_merged(self)

    @property
    def comfy_patched_weights(self) -> bool:
        """Host's mark of a module that is loaded and has its patches. True also before that, so
        that the host does not write them in; False while the host keeps it offloaded, when it asks
        whether there is something to offload.
        """
        if self.written or "prev_comfy_cast_weights" not in self.__dict__:
            return True
        if not self.comfy_force_cast_weights:  # then the attribute means that it is offloaded
            return False
        return not self.unloaded and self.loaders_patch() is self.gguf_patch

    @comfy_patched_weights.setter
    def comfy_patched_weights(self, written: bool):
        self.written, self.unloaded = written, not written
        if self.unloaded:
            self.gguf_residency.release(self)

    @comfy_patched_weights.deleter
    def comfy_patched_weights(self):
        """The host takes all patches away."""
        self.written, self.unloaded = False, False
        self.gguf_patch = None
        self.forget_loras()


class HandOver:
    """Host's ON_LOAD callback of one model: gives fully loaded modules their patches, and for each
    new set of LoRAs drops the last one's branches and logs once which weights it meets, and how.
    """

    def __init__(self):
        self.known = None

    def __call__(self, patcher, device, *_loading):
        new, self.known = self.known != patcher.patches_uuid, patcher.patches_uuid
        if new:
            for module in patcher.model.modules():
                if isinstance(module, TakesLoRA):
                    module.forget_loras()
        for key in patcher.patches:
            path, _, name = key.rpartition(".")
            module = patcher.model.get_submodule(path)
            if isinstance(module, TakesLoRA) and not patcher.is_dynamic():
                hand_over(patcher, module, key, name, device)
        if new and patcher.patches:
            log.info("%s", summary(patcher))


def hand_over(patcher, module, key: str, name: str, device: torch.device) -> None:
    """Give a fully loaded module the patches of its parameter `name` that the host passed over."""
    if key in patcher.backup or not module.comfy_patched_weights:
        return  # written already, or offloaded with patches that wait
    if name == "weight" and side_branch(patcher.patches[key], tuple(module.weight.shape)):
        module.gguf_patch = LowVramPatch(key, patcher.patches)
    else:
        patcher.patch_weight_to_device(key, device_to=device)
        saved = patcher.backup[key]
        if isinstance(saved.weight, QuantizedTensor):
            # wrapped anew: in inference mode torch puts back none that was wrapped outside it
            given = saved.weight._qdata, saved.weight._layout_cls, saved.weight._params
            patcher.backup[key] = saved._replace(weight=QuantizedTensor(*given))


def summary(patcher) -> str:
    """'LoRA on 200 weights of SD3: 198 as side branches of rank 16; 2 added to the weights: …'"""
    branches, dense = [], []
    for key, patches in patcher.patches.items():
        module = patcher.model.get_submodule(key.rpartition(".")[0])
        weight = key.endswith(".weight") and isinstance(module, TakesLoRA)
        branch = side_branch(patches, tuple(module.weight.shape)) if weight else None
        branches.append(branch) if branch else dense.append(key)
    text = f"LoRA on {len(patcher.patches)} weights of {type(patcher.model).__name__}"
    if branches:
        ranks = sorted({branch.rank for branch in branches})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        text += f": {len(branches)} as side branches of {rank}"
    if dense:
        more = f" and {len(dense) - NAMED} more" if len(dense) > NAMED else ""
        text += f"; {len(dense)} added to the weights: {', '.join(dense[:NAMED])}{more}"
    return text


def take_loras(patcher) -> None:
    """Let a freshly loaded MODEL or CLIP's patcher hand LoRAs over to its modules."""
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, __name__, HandOver())
