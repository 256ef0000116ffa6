"""GGUF blocks as a layout of the host's own `QuantizedTensor`.

ComfyUI (through comfy-kitchen) already moves, pins, offloads, counts and patches quantised weights.
A GGUF weight therefore needs no tensor subclass: it is a `QuantizedTensor` whose bytes are ggml
blocks and whose parameters say which type they are. Any operation without a faster way falls back
to `dequantize`, which comfy-kitchen does by itself.
"""

from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams
from gguf import GGMLQuantizationType

from ..quant import GGUFError, dequantize, quantize

LAYOUT = "FewStepGGUFLayout"


class GGUFLayout(QuantizedLayout):
    """ggml blocks: `qdata` is uint8 (rows, bytes of a row), as they lie in the file."""

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseLayoutParams):
        """`qtype` names the block format. A block carries its own scales, so `scale` is unused."""

        scale: None = None
        qtype: GGMLQuantizationType

        def _tensor_fields(self) -> list[str]:
            return []

    @classmethod
    def quantize(cls, tensor, qtype=GGMLQuantizationType.Q8_0, **_host_options):
        """(…, row) float -> blocks. The host's options (`scale`, `stochastic_rounding`) have no
        meaning for ggml blocks: their scales follow from the values alone.

        Raises: GGUFError for the few types that need an importance, and for what is not finite.
        """
        rows = tensor.detach().float().reshape(-1, tensor.shape[-1])
        try:
            qdata = quantize(rows, qtype)
        except GGUFError as error:
            raise GGUFError(
                f"A {qtype.name} weight cannot take floats in place, as saving a partly loaded "
                f"model may ask for: {error}. Take a Q8_0 file."
            ) from error
        params = cls.Params(orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape), qtype=qtype)
        return qdata, params

    @classmethod
    def requantize_kwargs(cls, qtensor):
        return {"qtype": qtensor.params.qtype}

    @classmethod
    def dequantize(cls, qdata, params):
        return dequantize(qdata, params.qtype, params.orig_shape, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata}


register_layout_class(LAYOUT, GGUFLayout)


def wrap(
    blocks: torch.Tensor,
    qtype: GGMLQuantizationType,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedTensor:
    """uint8 blocks -> a `QuantizedTensor` of `shape` that passes for a tensor of `dtype`.

    `dtype` is what the host takes the weight for when it chooses compute types: bfloat16, the type
    in which the models behind today's GGUF files were trained. It costs no precision: the values
    are dequantised straight into the type that a computation asks for.
    """
    params = GGUFLayout.Params(orig_dtype=dtype, orig_shape=tuple(shape), qtype=qtype)
    return QuantizedTensor(blocks, LAYOUT, params)


def is_gguf(tensor) -> bool:
    """True for a `QuantizedTensor` of this layout (the host has others)."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == LAYOUT


def dense(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A quantised tensor unpacked to `dtype`; any other as it is.

    The host's `.to(dtype)` would copy the packed bytes as well.
    """
    if is_gguf(tensor):
        return dequantize(tensor._qdata, tensor.params.qtype, tuple(tensor.shape), dtype)
    return tensor.to(dtype=dtype).dequantize() if isinstance(tensor, QuantizedTensor) else tensor
