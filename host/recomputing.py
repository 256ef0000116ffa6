"""Gradient checkpointing of blocks that change tensors in place.

Some of the host's blocks change what they are given, or what their backward needs (`img += …`).
torch's own checkpointing keeps what a block is given and, computing it again, takes what it saves
as it stands at the end: there it computes wrong gradients without a word. Here blocks are given
copies, and are watched for changes of what was saved.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only


def recomputing(forward: Callable, held: Callable[[], Callable[[], AbstractContextManager]]):
    """`forward`, of which only what it is given is kept for the backward, which computes it again.

    `held()` gives what makes a context anew that is like the one at hand; it is computed in that
    both times.
    """
    changing: list[bool] = []  # holds one where a call changed what was saved

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        inside = held()

        def call():
            given, more = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            with inside():
                return forward(*given, **more)

        again = _Again(call, changing)
        with saved_tensors_hooks(again.pack, again.unpack):
            return call()

    return run


class _Enough(Exception):
    """All that was saved is there again."""


class _Again:
    """What autograd saved of a call: numbers, until the backward asks for the first tensor; then it
    is called again.

    Where a tensor was changed in place after it was saved, it is called once more, and what is
    saved is copied; `changing` is told, and the next call's is copied from the start.
    """

    def __init__(self, call: Callable[[], Any], changing: list[bool]):
        self.call, self.changing = call, changing
        self.count, self.saved = 0, {}

    def pack(self, _tensor: Tensor) -> int:
        self.count += 1
        return self.count - 1

    def unpack(self, number: int) -> Tensor:
        if number not in self.saved:
            self.saved = dict(enumerate(self._compute()))
        return self.saved.pop(number)

    def _compute(self) -> list[Tensor]:
        copying, saved, versions = bool(self.changing), [], []

        def keep(tensor: Tensor) -> None:
            tensor = tensor.detach()
            saved.append(tensor.clone() if copying else tensor)
            versions.append(_version(saved[-1]))
            if len(saved) == self.count:
                raise _Enough

        with suppress(_Enough), torch.enable_grad(), saved_tensors_hooks(keep, _never):
            self.call()
        if versions == [_version(tensor) for tensor in saved]:
            return saved
        self.changing.append(True)
        return self._compute()


def _version(tensor: Tensor) -> int:
    """How often it was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _never(_saved: Any) -> Tensor:
    raise RuntimeError("a call that is made again has no backward of its own")
