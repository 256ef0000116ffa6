"""A VAE's convolutions on a CPU that computes in float32: by our kernel, where it has one."""

import torch

from ..quant import Convolution, convolves


class _ByKernel(torch.nn.Conv2d):
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
    is one.
    """
    own, classes = {"convolution": Convolution()}, {}
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and convolves(module.weight):
            kind = type(module)
            if kind not in classes:
                classes[kind] = type(kind.__name__, (_ByKernel, kind), own)
            module.__class__ = classes[kind]
