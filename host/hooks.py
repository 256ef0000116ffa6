"""LoRA hooks of conditionings (ComfyUI's *Create Hook LoRA* and keyframes) on our operations.

Wherever the hooks or their strengths change, the host writes weight and LoRA in the weight's place,
and keeps both as floats. A quantised weight would round the LoRA away, and such copies outweigh the
file. So what the host has registered for our weights is taken from it, and each weight asks, when
it is used, for the hooks that are current now: they join the LoRAs that wait for it, see `lora.py`.
Nothing is written, and nothing has to be put back.
"""

import logging
import weakref

import comfy.lora
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP

from .lora import TakesLoRA

log = logging.getLogger(__name__)


def is_loaders(function) -> bool:
    """Whether a weight's function is the host's `LowVramPatch`, which it hangs there with the LoRAs
    of loaders where it keeps the weight offloaded.
    """
    return getattr(function, "is_lowvram_patch", False)


class TakesHooks:
    """Mixin for an operation, see `ops.py`."""

    gguf_patch = None  # the host's `LowVramPatch`: LoRAs that wait to be applied
    gguf_hooks = None  # a `Current`

    def loaders_patch(self) -> LowVramPatch | None:
        """LoRAs of loaders that wait, if any."""
        return next(filter(is_loaders, self.weight_function), self.gguf_patch)

    def waiting_patch(self) -> LowVramPatch | None:
        """All LoRAs that are to be applied to this weight now, those of hooks last."""
        patch = self.loaders_patch()
        return patch if self.gguf_hooks is None else self.gguf_hooks.after(patch, self.weight)


class HookedPatch(LowVramPatch):
    """Patches of a weight, some of which may ask for it as it was (`original`)."""

    def __init__(self, key: str, patches: list[tuple], original):
        super().__init__(key, {key: patches})
        self.original = original

    def __call__(self, weight):
        return comfy.lora.calculate_weight(
            self.patches[self.key],
            weight,
            self.key,
            intermediate_dtype=weight.dtype,
            original_weights={self.key: [(self.original,)]},
        )


class Current:
    """What the hooks that are current in `patcher` hold for the weight `key`."""

    def __init__(self, registered, patcher, key: str):
        self.registered, self.patcher, self.key = registered, weakref.ref(patcher), key

    def after(self, waiting: LowVramPatch | None, weight) -> LowVramPatch | None:
        """`waiting`, and after it the hooks' patches at their strengths of now."""
        patcher = self.patcher()
        if patcher is None or patcher.current_hooks is None:
            return waiting
        added = [
            (patch[0] * hook.strength, *patch[1:])
            for hook in patcher.current_hooks.hooks
            for patch in self.registered.get(hook.hook_ref, {}).get(self.key, ())
        ]
        if not added:
            return waiting
        before = waiting.patches[waiting.key] if waiting else []
        written = patcher.backup.get(self.key)
        original = weight if written is None else written.weight
        return HookedPatch(self.key, before + added, original)


class Hooks:
    """The host's callbacks of one MODEL or CLIP, and of its clones."""

    def __init__(self):
        self.registered = weakref.WeakKeyDictionary()  # by a hook's reference: {key: patches}

    def take(self, patcher, *_registering) -> None:
        """ON_REGISTER_ALL_HOOK_PATCHES: takes what would be written into our weights."""
        for reference, patches in patcher.hook_patches.items():
            ours = {key: patches.pop(key) for key in list(patches) if _taker(patcher, key)}
            if ours and reference not in self.registered:
                name = type(patcher.model).__name__
                log.info("LoRA hook on %d weights of %s, none of them rewritten", len(ours), name)
            self.registered.setdefault(reference, {}).update(ours)

    def follow(self, patcher, *_) -> None:
        """ON_LOAD and ON_APPLY_HOOKS: `patcher` is the one whose hooks count from now on."""
        for key in self.keys():
            _taker(patcher, key).gguf_hooks = Current(self.registered, patcher, key)

    def forget(self, patcher, *_) -> None:
        """ON_CLEANUP, after sampling."""
        for key in self.keys():
            module = _taker(patcher, key)
            module.gguf_hooks = None
            if isinstance(module, TakesLoRA):
                module.forget_loras()

    def keys(self) -> set[str]:
        return {key for patches in self.registered.values() for key in patches}


def _taker(patcher, key: str) -> TakesHooks | None:
    """The operation whose weight `key` is; None if it is another's, or not a weight."""
    path, _, name = key.rpartition(".")
    module = patcher.model.get_submodule(path)
    return module if name == "weight" and isinstance(module, TakesHooks) else None


def take_hooks(patcher) -> None:
    """Let a freshly loaded MODEL or CLIP's patcher leave LoRA hooks to its operations."""
    hooks = Hooks()
    for call, callback in {
        CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES: hooks.take,
        CallbacksMP.ON_LOAD: hooks.follow,
        CallbacksMP.ON_APPLY_HOOKS: hooks.follow,
        CallbacksMP.ON_CLEANUP: hooks.forget,
    }.items():
        patcher.add_callback_with_key(call, __name__, callback)
