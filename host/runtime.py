"""Weights turned, while they are loaded, into formats that the processor itself multiplies.

They are the host's own layouts (`comfy_kitchen.tensor`): int8 with rotation, fp8, mxfp8, nvfp4. A
small file on disk is then faster in use than bfloat16, and LoRAs stay side branches; but weights
and activations are rounded, so a picture is not the file's to the last bit, and the error is told.
What the file itself keeps in 16 bits or more stays as it is, and so does everything where the
processor lacks the format.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_kitchen.tensor import get_layout_class

from ..quant.kernels import find_kernels
from ..quant.measure import Errors, all_finite
from .cpu import capabilities

EXACT = "exact"
_INT8 = "TensorWiseINT8Layout"
_GROUPS = (256, 64, 16)  # columns that int8's rotation may mix, best first
_MEASURED = 8  # the error is that of each so-manieth weight


def _int8_here(device: torch.device) -> bool:
    if device.type == "cpu":
        there = capabilities()
        return any(there.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return device.type == "cuda" and get_layout_class(_INT8).supports_fast_matmul()


@dataclass(frozen=True)
class Format:
    """layout: the host's. needs: what has it, for the message. rounds: whether the layout wants its
    inputs rounded beforehand (int8's product does that itself), with these options.
    """

    name: str
    layout: str
    needs: str
    here: Callable[[torch.device], bool]
    rounds: dict | None

    def options(self, columns: int) -> dict:
        """For the layout's `quantize` of a weight."""
        if self.layout != _INT8:
            return self.rounds
        group = next((size for size in _GROUPS if columns % size == 0), None)
        rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
        return {"per_channel": True, **rotation}


_management = comfy.model_management
FORMATS = {
    row.name: row
    for row in (
        Format("int8", _INT8, "an Nvidia GPU from Turing on, or a CPU with VNNI", _int8_here, None),
        Format("fp8", "TensorCoreFP8E4M3Layout", "an Nvidia GPU from Ada on",
               _management.supports_fp8_compute, {"scale": "recalculate"}),
        Format("mxfp8", "TensorCoreMXFP8Layout", "an Nvidia GPU from Blackwell on",
               _management.supports_mxfp8_compute, {}),
        Format("nvfp4", "TensorCoreNVFP4Layout", "an Nvidia GPU from Blackwell on",
               _management.supports_nvfp4_compute, {}),
    )
}  # fmt: skip
CHOICES = [EXACT, *FORMATS]


class NotFiniteError(ValueError):
    """A weight holds NaN or infinity."""


class Runtime:
    """One model's weights on their way into a format, and what that costs."""

    def __init__(self, format: Format, device: torch.device):
        self.format, self.device = format, device
        self.turned, self.errors = 0, Errors()

    def turn(self, weight: QuantizedTensor) -> QuantizedTensor:
        """A GGUF weight (rows, columns) in the format, on the device that it came from.

        Raises: NotFiniteError.
        """
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        exact = weight.to(self.device).to(dtype=dtype).dequantize()
        if not all_finite(exact):
            raise NotFiniteError
        options = self.format.options(exact.shape[1])
        turned = QuantizedTensor.from_float(exact, self.format.layout, **options)
        if self.turned % _MEASURED == 0:
            self.errors.add(exact.float(), turned.dequantize().float())
        self.turned += 1
        return turned.to(device=weight.device).to(dtype=weight.dtype)

    def multiply(
        self, input: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """(…, columns) times a weight in the format -> (…, rows), both rounded."""
        x = input.reshape(-1, input.shape[-1])
        if self.format.layout == _INT8 and x.device.type == "cpu" and (ours := _int8_kernels()):
            output = _multiply_int8(ours, x, weight, bias)
        else:
            if self.format.rounds is not None:
                x = QuantizedTensor.from_float(x, self.format.layout, **self.format.rounds)
            output = torch.nn.functional.linear(x, weight.to(dtype=input.dtype), bias)
        return output.reshape(*input.shape[:-1], len(weight))

    def __str__(self) -> str:
        return (
            f"runtime {self.format.name}: {self.turned} weights turned, relative error "
            f"{self.errors.relative:.3g} against the file's"
        )


def choose(name: str, device: torch.device) -> tuple[Runtime | None, str]:
    """What weights are to be turned into on `device`, None for nothing; and a line that says why
    nothing, where something was asked for. Raises: ValueError for an unknown name.
    """
    if name == EXACT:
        return None, ""
    if name not in FORMATS:
        raise ValueError(f"runtime '{name}' is unknown: take one of {', '.join(CHOICES)}.")
    format = FORMATS[name]
    if format.here(device):
        return Runtime(format, device), ""
    return None, (
        f"runtime '{name}' needs {format.needs}, which this machine's {device.type} is not: "
        "weights stay exact"
    )


def here() -> str:
    """The formats that the machine's device has, for a person: 'int8, fp8', or 'none'."""
    device = comfy.model_management.get_torch_device()
    return ", ".join(name for name, row in FORMATS.items() if row.here(device)) or "none"


@cache
def _int8_kernels() -> ModuleType | None:
    """Compiled kernels for the CPU, if numba is there and works."""
    return find_kernels("numba_int8", "multiplying int8")


def _multiply_int8(ours: ModuleType, x: torch.Tensor, weight: QuantizedTensor, bias):
    params, dtype = weight.params, x.dtype
    rotated = params.convrot and params.convrot_groupsize == ours.GROUP
    x = x.float()
    if params.convrot and not rotated:
        size = params.convrot_groupsize
        x = (x.view(len(x), -1, size) @ _hadamard(size)).reshape(x.shape)
    bias = None if bias is None else bias.float()
    scale = params.scale.float().reshape(-1)
    return ours.linear(x, weight._qdata, scale, bias, rotated).to(dtype)


@cache
def _hadamard(size: int) -> torch.Tensor:
    """The regular Hadamard matrix of a power of four, orthogonal and symmetric."""
    h4 = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    h = h4 if size == 4 else torch.kron(_hadamard(size // 4) * (size // 4) ** 0.5, h4)
    return h / size**0.5
