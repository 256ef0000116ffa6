"""LoRAs baked into a model's weights on the way to a GGUF file, a few rows at a time.

A layer of a LoRA is a low-rank product, `strength · alpha / rank · up @ down`, or (`.diff`) the
difference itself. Other kinds are told by name: FewStep Quantize bakes them with ComfyUI's own
arithmetic.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from .architectures import find_architecture, prefix_of
from .errors import GGUFError
from .lora_names import TEXT_ENCODERS, Target, find, targets
from .sources import Source, open_source
from .stored import StoredTensor

# What the two factors are called: kohya, PEFT, old diffusers, and their variants.
_FACTORS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B", ".lora_A"),
    (".lora.up.weight", ".lora.down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
)
_DIFF, _BIAS_DIFF, _ALPHA = ".diff", ".diff_b", ".alpha"
# What gives a kind away that takes more than a product to bake.
_OTHER_KINDS = {
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
    ".lokr_w1_a": "LoKr",
    ".oft_blocks": "OFT",
    ".oft_R.weight": "OFT",
    ".oft_diag": "OFT",
    ".a1.weight": "GLoRA",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_mid.weight": "Tucker LoCon",
    ".reshape_weight": "LoRA that changes shapes",
    ".set_weight": "set of whole weights",
}


@dataclass(frozen=True, eq=False)
class Part:
    """What is added to the rows `first` … `last` (of the first dimension): scale · up @ down;
    scale · up alone, where `down` is None."""

    up: StoredTensor
    down: StoredTensor | None
    scale: float
    first: int
    last: int

    def delta(self, first: int, last: int) -> Tensor:
        """(last - first, weights of a row) float32, rows counted in the whole weight."""
        each = self.up.rows // self.up.shape[0] if self.up.shape else 1
        first, last = first - self.first, last - self.first
        rows = self.up.read(first * each, last * each).reshape(last - first, -1)
        if self.down is None:
            return self.scale * rows
        down = self.down.read(0, self.down.rows).reshape(self.down.shape[0], -1)
        return self.scale * (rows @ down)


@dataclass(frozen=True, eq=False)
class Baked(StoredTensor):
    """A tensor with LoRAs added."""

    base: StoredTensor | None = None
    parts: tuple[Part, ...] = ()

    def read(self, start: int, stop: int) -> Tensor:
        """(stop - start, cols) float32."""
        values = self.base.read(start, stop)
        if len(self.shape) < 2:
            for part in self.parts:
                values[:, part.first : part.last] += part.scale * part.up.read(0, part.up.rows)
            return values
        each = self.rows // self.shape[0]  # rows that share an index of the first dimension
        for part in self.parts:
            first, last = max(part.first, start // each), min(part.last, -(-stop // each))
            if first >= last:
                continue
            delta = part.delta(first, last).view(-1, self.cols)
            at = first * each - start
            inside = delta[max(0, -at) : stop - start - at]
            values[max(0, at) : max(0, at) + len(inside)] += inside
        return values


def bake(source: Source, loras: Sequence[tuple[str, float]], prefix: str | None = None) -> Source:
    """`source` with LoRA files added, each at its strength. prefix: as for `make_plan`.

    Raises: GGUFError for a file that fits nothing, does not fit, or is of a kind that cannot be
    baked here.
    """
    prefix = prefix_of(source.tensors) if prefix is None else prefix
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in source.tensors.items()
        if name.startswith(prefix)
    }
    known = targets(inside, find_architecture(inside).tag)
    parts: dict[str, list[Part]] = {}
    notes = []
    for path, strength in loras:
        found, note = _parts(path, strength, source.path, inside, known)
        notes.append(note)
        for weight, part in found:
            parts.setdefault(weight, []).append(part)
    tensors = dict(source.tensors)
    for weight, added in parts.items():
        tensors[prefix + weight] = _baked(inside[weight], tuple(added))
    files = (*source.files, *(path for path, _ in loras))
    return replace(source, tensors=tensors, files=files, notes=(*source.notes, *notes))


def _baked(base: StoredTensor, parts: tuple[Part, ...]) -> Baked:
    given = {field.name: getattr(base, field.name) for field in fields(StoredTensor)}
    label = f"{base.label} + LoRA"
    return Baked(**given | {"label": label, "qtype": None}, base=base, parts=parts)


def _parts(
    path: str,
    strength: float,
    model: str,
    inside: Mapping[str, StoredTensor],
    known: Mapping[str, Target],
) -> tuple[list[tuple[str, Part]], str]:
    """([(weight, what is added to it)], a line on what fitted)"""
    tensors = open_source(path).tensors
    _refuse_other_kinds(path, tensors)
    found, lost, text = [], [], 0
    for layer, up, down in _layers(path, tensors):
        bias = down is None and up.name.endswith(_BIAS_DIFF)
        target = find(layer, known)
        if target is not None and bias:
            target = _bias_of(target, inside)
        if target is not None:
            part = Part(up, down, strength, target.first, target.last)
            _check_shape(path, layer, part, inside[target.weight])
            part = replace(part, scale=strength * _alpha(path, tensors, layer, down))
            found.append((target.weight, part))
        elif layer.startswith(TEXT_ENCODERS):
            text += 1
        else:
            lost.append(layer)
    if not found:
        first = next(iter(tensors), "none")
        raise GGUFError(
            f"{path}: fits no tensor of {model} (its first tensor is {first!r}): it is for another "
            "model, or for a text encoder"
        )
    note = f"baked in: {path} at {strength:g}, {len(found)} layers"
    ends = (_ALPHA, _DIFF, _BIAS_DIFF, *(end for pair in _FACTORS for end in pair))
    lost += [name for name in tensors if not name.endswith(ends)]
    if text:
        note += f"; left out {text} of text encoders"
    if lost:
        note += f"; {len(lost)} fit nothing, {lost[0]} first"
    return found, note


def _layers(path: str, tensors: Mapping[str, StoredTensor]):
    """(layer's name, up, down) of each layer; of a plain difference (layer, difference, None)."""
    for name, tensor in tensors.items():
        for up, down in _FACTORS:
            if name.endswith(up):
                layer = name.removesuffix(up)
                if layer + down not in tensors:
                    raise GGUFError(f"{path}: {name!r} has no {layer + down!r} beside it")
                yield layer, tensor, tensors[layer + down]
                break
        else:
            for end in (_DIFF, _BIAS_DIFF):
                if name.endswith(end):
                    yield name.removesuffix(end), tensor, None


def _refuse_other_kinds(path: str, tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.block[0] > 1:
            raise GGUFError(
                f"{path}: tensor {name!r} is {tensor.label}: take the LoRA as .safetensors"
            )
        for end, kind in _OTHER_KINDS.items():
            if name.endswith(end):
                raise GGUFError(
                    f"{path}: {name!r} makes it a {kind}, which cannot be baked here: load it in "
                    "ComfyUI and write the MODEL with FewStep Quantize"
                )


def _bias_of(target: Target, inside: Mapping[str, StoredTensor]) -> Target | None:
    name = target.weight.removesuffix("weight") + "bias"
    return Target(name, target.first, target.last) if name in inside else None


def _alpha(
    path: str, tensors: Mapping[str, StoredTensor], layer: str, down: StoredTensor | None
) -> float:
    """alpha / rank; 1 where the file names no alpha."""
    alpha = tensors.get(layer + _ALPHA)
    if alpha is None or down is None:
        return 1.0
    value = float(alpha.read(0, alpha.rows)) if alpha.numel == 1 else math.nan
    if not math.isfinite(value):
        raise GGUFError(f"{path}: {alpha.name!r} is no number: get another file")
    return value / down.shape[0]


def _check_shape(path: str, layer: str, part: Part, weight: StoredTensor) -> None:
    rows, row = part.last - part.first, weight.numel // max(1, weight.shape[0])
    up, down = part.up, part.down
    inner = up.numel // max(1, up.shape[0]) if up.shape else 0
    if down is None:
        fits = row == inner and (len(weight.shape) > 1 or len(up.shape) == 1)
    else:
        fits = inner > 0 and down.shape[:1] == (inner,) and down.numel == inner * row
        fits = fits and len(weight.shape) > 1
    if not (fits and weight.numel and up.shape[:1] == (rows,)):
        shapes = " @ ".join(str(tensor.shape) for tensor in (up, down) if tensor is not None)
        raise GGUFError(
            f"{path}: layer {layer!r} is {shapes}, which does not fit {rows} rows of "
            f"{weight.name!r} {weight.shape}: it is for another model"
        )


def parse_lora(text: str) -> tuple[str, float]:
    """'file.safetensors:0.8' -> (file, strength); without a strength, 1.

    Raises: GGUFError for NaN and infinity, and for what is no number after a file that there is.
    """
    path, sign, given = text.rpartition(":")
    try:
        strength = float(given)
    except ValueError:
        if not os.path.exists(text) and os.path.isfile(path):
            raise GGUFError(f"{text!r}: {given!r} is no strength: it takes a number") from None
        return text, 1.0
    if not math.isfinite(strength):
        raise GGUFError(f"{text!r}: {given} is no strength")
    return (path, strength) if sign and path else (text, 1.0)
