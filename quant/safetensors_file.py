"""A safetensors file's header: where each tensor lies, fp8 weights with the scales beside them.

Source: github.com/huggingface/safetensors, README, "Format"; ComfyUI `comfy/utils.py`
(`convert_old_quants`) and `comfy/ops.py` for the names of scales.
"""

import json
import math
import os
from dataclasses import replace
from typing import BinaryIO

import torch
from gguf import GGMLQuantizationType as T

from . import sniff
from .errors import ANEW, DAMAGED, GGUFError
from .stored import StoredTensor, plain_decoder

DTYPES: dict[str, tuple[torch.dtype, T | None]] = {
    "F64": (torch.float64, T.F64),
    "F32": (torch.float32, T.F32),
    "F16": (torch.float16, T.F16),
    "BF16": (torch.bfloat16, T.BF16),
    "F8_E4M3": (torch.float8_e4m3fn, None),
    "F8_E5M2": (torch.float8_e5m2, None),
    "I64": (torch.int64, T.I64),
    "I32": (torch.int32, T.I32),
    "I16": (torch.int16, T.I16),
    "I8": (torch.int8, T.I8),
    "U8": (torch.uint8, None),
    "BOOL": (torch.bool, None),
}
FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's name until 2025, and since
BESIDE = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")  # what belongs to an fp8 layer
MARKER = "scaled_fp8"  # an empty tensor: this file's fp8 weights have scales
_MAX_HEADER = 100_000_000  # bytes, the format's own bound


def read_header(path: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """(tensors by name, the header's `__metadata__`); nothing of a tensor is read but scales.

    Raises: GGUFError, one line, for a file that is damaged or holds weights in another packing.
    """
    try:
        with open(path, "rb") as file:
            header, start, size = _parse(file)
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror or error}") from error
    except GGUFError as error:
        raise GGUFError(f"{path}: {error}") from error
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise GGUFError(f"{path}: __metadata__ holds no texts by name; {DAMAGED}")
    tensors = {name: _stored(path, name, entry, start) for name, entry in header.items()}
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    if end > size:
        raise GGUFError(
            f"{path}: {end - size} of {end} bytes are missing: the download is incomplete: "
            "download it again"
        )
    return join_scales(tensors), {key: str(value) for key, value in metadata.items()}


def join_scales(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """fp8 weights with their scales, and without the tensors that only say how to read them.

    Raises: GGUFError for layers that are packed otherwise (nvfp4, mxfp8, int8).
    """
    joined = {}
    for name, tensor in tensors.items():
        layer, dot, kind = name.rpartition(".")
        weight = tensors.get(f"{layer}.weight")
        if name.endswith(MARKER):
            continue
        if dot + kind in BESIDE and weight is not None:
            if dot + kind == ".comfy_quant":
                _check_form(weight, tensor)
            continue
        joined[name] = _scaled(tensors, tensor) if name.endswith(".weight") else tensor
    return joined


def _scaled(tensors: dict[str, StoredTensor], weight: StoredTensor) -> StoredTensor:
    layer = weight.name.removesuffix(".weight")
    scales = [tensors[layer + suffix] for suffix in SCALES if layer + suffix in tensors]
    if not scales:
        return weight
    scale, rows = scales[0], weight.shape[:-1][:1]  # one for all, or one a row; not one a block
    by_row = scale.shape[:1] == rows and scale.numel == math.prod(rows)
    if weight.label not in FP8 or not (scale.numel == 1 or by_row):
        raise GGUFError(
            f"{weight.path}: tensor {weight.name!r} is {weight.label} with a scale of shape "
            f"{scale.shape}, a packing that cannot be read: get the fp16 or bf16 file"
        )
    return replace(weight, scale=scale.read(0, scale.rows).reshape(-1))


def _check_form(weight: StoredTensor, mark: StoredTensor) -> None:
    """`mark`: ComfyUI's JSON about a layer, {"format": "float8_e4m3fn"}, as bytes."""
    try:
        form = json.loads(mark.raw(0, mark.rows).numpy().tobytes())["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GGUFError(f"{mark.path}: tensor {mark.name!r} is no ComfyUI mark") from error
    if form not in ("float8_e4m3fn", "float8_e5m2"):
        raise GGUFError(
            f"{weight.path}: tensor {weight.name!r} is stored as {form}, which cannot be read: "
            "get the fp16, bf16 or fp8 file"
        )


def _parse(file: BinaryIO) -> tuple[dict, int, int]:
    """(header, where the data begins, the file's size), in bytes."""
    size, head = os.fstat(file.fileno()).st_size, file.read(64)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{":
        what = sniff.describe(head, ANEW) if head else "empty: download it again"
        raise GGUFError(f"not a safetensors file but {what}")
    if length > _MAX_HEADER:
        raise GGUFError(f"the header would take {length} bytes; {DAMAGED}")
    if 8 + length > size:
        raise GGUFError("the header is cut short: download it again")
    file.seek(8)
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise GGUFError(f"the header is no JSON; {DAMAGED}") from error
    return header, 8 + length, size


def _stored(path: str, name: str, entry: dict, start: int) -> StoredTensor:
    try:
        label, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise GGUFError(f"{path}: tensor {name!r} has no proper entry; {DAMAGED}") from error
    if not isinstance(label, str) or label not in DTYPES:
        known = ", ".join(DTYPES)
        raise GGUFError(f"{path}: tensor {name!r} is {label}, which is not known (known: {known})")
    dtype, qtype = DTYPES[label]
    whole = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, first, last))
    if not whole or last - first != math.prod(shape) * dtype.itemsize:
        raise GGUFError(f"{path}: tensor {name!r} does not fit its {shape} of {label}; {DAMAGED}")
    return StoredTensor(
        path=path,
        name=name,
        shape=shape,
        label=label,
        offset=start + first,
        nbytes=last - first,
        block=(1, dtype.itemsize),
        decode=plain_decoder(dtype),
        qtype=qtype,
    )
