"""What a GPU is fastest with for a few tokens: products that never write the unpacked weight out.

Text encoders and small pictures bring few tokens: there unpacking a weight takes longer than
multiplying it. `quant/fused.py` does both in one kernel, where it has timed that to be faster.
"""

import torch

from ..quant.fused import MOST, multiply_fused, prefers_fused
from .layout import is_gguf


def multiply_on_gpu(module: torch.nn.Module, input: torch.Tensor, branch) -> torch.Tensor | None:
    """`module`'s output, LoRAs of its side branch included, by such a kernel; None where there is
    none, or unpacking first is faster.

    The weight must be as it was loaded: neither patches nor functions of the host but the side
    branch.
    """
    if input.numel() > MOST * input.shape[-1] or not _may(module):
        return None
    blocks, qtype = module.weight._qdata, module.weight.params.qtype
    flat = input.reshape(-1, input.shape[-1])
    if not prefers_fused(blocks, qtype, flat):
        return None
    weight, bias, stream = module.cast_packed(input)
    try:
        output = multiply_fused(weight._qdata, qtype, flat, bias)
    finally:
        module.uncast(weight, bias, stream)
    if output is None:
        return None
    output = output if branch is None else branch.add(output, flat)
    return output.reshape(*input.shape[:-1], -1)


def _may(module: torch.nn.Module) -> bool:
    """Whether the weight is packed, does not stay unpacked, the order of sums is ours to choose,
    and no gradient is asked for: the kernel has none.
    """
    return (
        is_gguf(module.weight)
        and not torch.is_grad_enabled()
        and not module.gguf_exact
        and (module.gguf_text or not module.comfy_force_cast_weights)
        and not module.gguf_residency.keeps(module)
    )
