"""A device that is none: tensors in the CPU's memory that say they lie elsewhere.

Within `Elsewhere`, whatever mixes them with tensors of the CPU, or asks for their memory, raises as
on a GPU; all else is computed as ever. So what holds for any device is tested without one.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
_MOVES = {torch.Tensor.to, torch.Tensor.cpu}
_MEMORY = {torch.Tensor.numpy, torch.Tensor.data_ptr}


class There(torch.Tensor):
    """A tensor that says it lies elsewhere."""


class Elsewhere(TorchFunctionMode):
    """device: what its tensors say. float64: whether it has that; MPS, for one, has not."""

    def __init__(self, device: torch.device, float64: bool = True):
        super().__init__()
        self.device, self.float64 = device, float64

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given, _ = tree_flatten((args, kwargs or {}))
        tensors = [item for item in given if isinstance(item, torch.Tensor)]
        there = any(isinstance(tensor, There) for tensor in tensors)
        if there and func == torch.Tensor.device.__get__:
            return self.device
        if there and func == torch.Tensor.is_cpu.__get__:
            return False
        asked = [item for item in given if isinstance(item, torch.device)]
        if func == torch.Tensor.cpu:
            asked = [CPU]
        if there and func not in _MOVES:
            self._check(func, tensors)
        args, kwargs = tree_map(_on_cpu, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return tree_map(_there if (self.device in asked if asked else there) else _here, result)

    def _check(self, func, tensors: list[torch.Tensor]) -> None:
        if func in _MEMORY:
            raise RuntimeError(f"{func.__name__} of a tensor on {self.device}")
        if any(not isinstance(tensor, There) and tensor.ndim for tensor in tensors):
            raise RuntimeError(f"{func.__name__}: tensors on {self.device} and on the CPU")
        if not self.float64 and (func == torch.Tensor.double or _doubles(tensors)):
            raise RuntimeError(f"{func.__name__}: {self.device} has no float64")


def _doubles(tensors: list[torch.Tensor]) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def _on_cpu(item):
    return CPU if isinstance(item, torch.device) else item


def _there(item):
    return item.as_subclass(There) if isinstance(item, torch.Tensor) else item


def _here(item):
    return item.as_subclass(torch.Tensor) if isinstance(item, There) else item
