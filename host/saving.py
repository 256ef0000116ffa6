"""What stands for a weight in a state dict, so that the host's save nodes write it as floats, LoRA
included, though it is quantised or its LoRA is computed beside it.

safetensors copies `numel * itemsize` bytes from a tensor's address: given blocks, it would read on
past their end. The host has the same trouble with weights whose patches are still to be applied,
and solves it with parameters on a made-up device, which safetensors moves to the CPU one by one
(`comfy.model_patcher.LazyCastingParam`). This is the same for blocks, and for side branches.
"""

import torch
from comfy.model_patcher import CustomTorchDevice


class SavedWeight(torch.Tensor):
    """Shape and type of `module.weight` as floats, its size as it lies, and no memory.

    `to` gives the floats, patches added, whatever it is asked for: only savers call it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, module):
        weight = module.weight
        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, empty)

    def __init__(self, module):
        self.module = module

    @property
    def device(self):
        return CustomTorchDevice

    @property
    def nbytes(self):
        return self.module.weight.nbytes

    def to(self, *_args, **_kwargs):
        module, waiting = self.module, self.module.waiting_patch()
        functions, module.weight_function = module.weight_function, []  # others' are not saved
        try:
            weight, bias, stream = module.cast(torch.float32, torch.device("cpu"), waiting)
        finally:
            module.weight_function = functions
        module.uncast(weight, bias, stream)
        return weight.to(self.dtype)

    def cpu(self, *_args, **_kwargs):
        return self.to("cpu")

    def detach(self):
        return self

    def requires_grad_(self, requires_grad=True):
        return self
