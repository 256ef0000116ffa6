"""A VAE's convolutions on a CPU that computes in float32: by our kernel, where it has one."""

import torch

from ..quant import Convolution, convolves


class _Faster(torch.nn.Conv2d):
    """What a convolution of the host's becomes."""

    convolution: Convolution

    def _conv_forward(self, input, weight, bias):
        """torch's, which the host calls with the weight that it has cast. Padding may be another by
        now: nodes for seamless pictures set it.
        """
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1
        padded = self.padding == (1, 1) and self.padding_mode == "zeros"
        out = self.convolution(input, weight, bias) if plain and padded else None
        return super()._conv_forward(input, weight, bias) if out is None else out


def use_fast_convolutions(network: torch.nn.Module) -> None:
    """Let the 3×3 convolutions of `network`, whose weights are loaded, run by our kernel, if there
    is one: their weights are laid out as it reads them, and those of the others so that all between
    them has its channels side by side in memory.
    """
    found = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    faster = {module for module in found if convolves(module.weight)}
    own = {"convolution": Convolution()}
    kinds = {kind: type(kind.__name__, (_Faster, kind), own) for kind in set(map(type, faster))}
    for module in found if faster else ():
        weight = module.weight.data
        if module in faster:
            module.__class__ = kinds[type(module)]
            weight = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
        else:
            weight = weight.contiguous(memory_format=torch.channels_last)
        module.weight.data = weight
