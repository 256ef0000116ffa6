"""torch.compile of models with weights of ours: a linear layer is one operation of the graph.

Inside it all goes as without compiling: our kernels, LoRAs, hooks, what stays unpacked, what the
host keeps offloaded. The compiler sees none of that, so nothing of it makes it compile again; what
lies between the layers is what it fuses. A layer is named to the operation by a number, which is
given as a tensor: as a constant of the graph it would ask for a graph for each block of a model.
"""

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_layers = WeakValueDictionary()
_numbers = count()

# Not for CUDA graphs, which would read a weight where it was when they were made, though the host
# has moved it or a LoRA's strength has changed since. Older torch has no such tag.
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_TAGS = {} if _UNSAFE is None else {"tags": (_UNSAFE,)}


@torch.library.custom_op("fewstep::linear", mutates_args=(), **_TAGS)
def _linear(input: Tensor, number: Tensor, rows: int) -> Tensor:
    """input (…, columns) through the layer of that number -> (…, rows), contiguous."""
    return _layers[number.item()].forward(input).contiguous()


@_linear.register_fake
def _(input, number, rows):
    return input.new_empty(*input.shape[:-1], rows)


class OneOperation:
    """Mixin for a linear operation, see `ops.py`."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        number = next(_numbers)
        _layers[number] = self
        with torch.inference_mode(False):
            self.gguf_number = torch.tensor(number, device="cpu")

    def forward(self, input):
        if torch.compiler.is_compiling():
            return _linear(input, self.gguf_number, self.out_features)
        return super().forward(input)
