"""A VAE's convolutions on a CPU: in float32 by our kernel, where it has one; in bfloat16 those of a
TAESD with what follows them.
"""

import torch
from comfy.taesd import taesd

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


class _AtOnce(taesd.Block):
    """What a block of the host's TAESD becomes. oneDNN adds the bias and what the block was given,
    and takes ReLU, before a convolution's result leaves the registers; the sum is rounded once.
    """

    def forward(self, x):
        first, second, third = self.conv[::2]
        if torch.is_grad_enabled() or not all(_is_plain(conv, x) for conv in self.conv[::2]):
            return super().forward(x)
        pointwise, rest = torch.ops.mkldnn._convolution_pointwise, ("relu", [], "")
        h = pointwise(pointwise(x, *_arguments(first), *rest), *_arguments(second), *rest)
        return pointwise.binary(h, x, *_arguments(third), "add", 1, *rest)


def _is_plain(conv: torch.nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether nothing but its weights in bfloat16 says what `conv` does: nodes for seamless
    pictures set other padding, or another method of the one object.
    """
    alike = conv.weight.dtype == x.dtype == torch.bfloat16 and conv.padding_mode == "zeros"
    return alike and not vars(conv).keys() & {"forward", "_conv_forward"}


def _arguments(conv: torch.nn.Conv2d) -> tuple:
    return conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups


def fuse_blocks(network: torch.nn.Module) -> None:
    """Let the blocks of a TAESD in bfloat16 run a convolution and what follows it at once, where
    oneDNN knows that type.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for module in network.modules():
        plain = type(module) is taesd.Block and module.pool is None
        if plain and isinstance(module.skip, torch.nn.Identity):
            module.__class__ = _AtOnce
