"""A MODEL's weights as a source for `quant`: its LoRAs baked in, a tensor at a time.

Untouched weights are read as they lie in memory or in the mapped file; a patched one is made in
float32 by the host's own arithmetic (`comfy.lora.calculate_weight`) when its turn comes.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor
from gguf import GGML_QUANT_SIZES

from ..flow import preset_to_metadata
from ..quant import GGUFError
from ..quant.safetensors_file import DTYPES
from ..quant.sources import Source
from ..quant.stored import StoredTensor, block_decoder, plain_decoder
from .layout import is_gguf

PREFIX = "diffusion_model."  # of the host's names
CPU = torch.device("cpu")
_LABELS = {dtype: (label, qtype) for label, (dtype, qtype) in DTYPES.items()}


class _InHand:
    """The one weight that is held as floats: memory stays that of a single tensor."""

    def __init__(self):
        self.tensor: ModelTensor | None = None
        self.floats: torch.Tensor | None = None
        self.lock = threading.Lock()  # rows are read by several threads


@dataclass(frozen=True, eq=False)
class ModelTensor(StoredTensor):
    """A weight of a MODEL. decode: None where the host must make it (see `_made`)."""

    weight: Any = None
    convert: Any = None
    patches: tuple = ()
    in_hand: _InHand = field(default_factory=_InHand)

    def raw(self, start: int, stop: int) -> torch.Tensor:
        """The bytes of the rows `start` … `stop`, 1-D uint8."""
        data = self.weight._qdata if is_gguf(self.weight) else self.weight.detach()
        size, width = self.block
        first, last = (row * self.cols // size * width for row in (start, stop))
        return data.contiguous().view(-1).view(torch.uint8)[first:last].cpu()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """(stop - start, cols) float32."""
        if self.decode is not None:
            return super().read(start, stop)
        hand = self.in_hand
        with hand.lock:
            if hand.tensor is not self:
                hand.tensor = hand.floats = None  # let the last one go first
                hand.tensor, hand.floats = self, self._made()
            return hand.floats[start:stop]

    def _made(self) -> torch.Tensor:
        """The whole weight as floats, patches added: (rows, cols) float32."""
        weight = comfy.model_management.cast_to_device(self.weight, CPU, torch.float32, copy=True)
        weight = self.convert(weight, inplace=True)
        made = comfy.lora.calculate_weight(list(self.patches), weight, PREFIX + self.name)
        if made.shape != self.shape:
            raise GGUFError(
                f"{self.path}: a LoRA makes tensor {self.name!r} {tuple(made.shape)} instead of "
                f"{self.shape}: such a LoRA changes the model's structure and cannot be baked"
            )
        return made.reshape(self.rows, self.cols)


def model_source(model, preset=None) -> Source:
    """The tensors of a MODEL, under the names that a file of its own gives them.

    `preset`: a flow Preset, whose `fewstep.*` fields the file shall carry.

    Raises: GGUFError where something acts on the MODEL that no weight can hold.
    """
    path = f"the MODEL ({type(model.model).__name__})"
    if model.injections:
        names = ", ".join(map(str, model.injections))
        raise GGUFError(
            f"{path}: carries {names}, which acts beside the weights while sampling and cannot be "
            "baked: load the LoRA with an ordinary LoRA loader, or leave that node out"
        )
    in_hand = _InHand()
    tensors = {}
    for key, (base, *patches) in model.get_key_patches(PREFIX).items():
        name = key.removeprefix(PREFIX)
        tensors[name] = _tensor(path, name, *base, tuple(patches), in_hand)
    baked = sum(bool(tensor.patches) for tensor in tensors.values())
    return Source(
        path,
        tensors,
        metadata=preset_to_metadata(preset) if preset else {},
        notes=(f"baked in: LoRAs or merges in {baked} of {len(tensors)} tensors",) if baked else (),
    )


def _tensor(path, name, weight, convert, patches, in_hand) -> ModelTensor:
    label, qtype, block, decode, nbytes = _form(weight)
    if patches:
        label, qtype, block, decode = f"{label} + LoRA", None, (1, 1), None
    return ModelTensor(
        path=path,
        name=name,
        shape=tuple(weight.shape),
        label=label,
        offset=0,
        nbytes=nbytes,
        block=block,
        decode=decode,
        qtype=qtype,
        weight=weight,
        convert=convert,
        patches=patches,
        in_hand=in_hand,
    )


def _form(weight):
    """How a weight lies in memory: label, qtype, block, decode and nbytes of `StoredTensor`."""
    if is_gguf(weight):
        qtype = weight.params.qtype
        block, nbytes = GGML_QUANT_SIZES[qtype], weight._qdata.nbytes
        return qtype.name, qtype, block, block_decoder(qtype), nbytes
    if isinstance(weight, QuantizedTensor):  # one of the host's own, fp8 with scales and the like
        return str(weight._layout_cls), None, (1, 1), None, weight._qdata.nbytes
    label, qtype = _LABELS[weight.dtype]
    return label, qtype, (1, weight.itemsize), plain_decoder(weight.dtype), weight.nbytes
