"""From a source and a recipe to a plan: each tensor's name in the new file, its type, and why."""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as T

from .architectures import (
    OTHER_PARTS,
    UNKNOWN,
    Architecture,
    architecture_named,
    find_architecture,
    is_diffusers,
    prefix_of,
)
from .errors import GGUFError
from .names import RENAMERS
from .quantize import writable_types
from .recipes import FALLBACKS, PLACES, Recipe, role_of
from .sources import Source
from .stored import StoredTensor
from .types import QTYPES

SMALL = 1024  # weights; tensors of no more stay float32 (city96's threshold)
LARGE_PARAMETER = 2**20  # weights; a bare parameter larger than this, or in F16, is F16, not F32
_INTEGERS = (T.I8, T.I16, T.I32, T.I64)


@dataclass(frozen=True)
class Choice:
    """One tensor of the new file. `why`: empty where the recipe's base type was simply taken.

    free: an ordinary matrix, whose type the recipe decides (and a budget may decide anew).
    """

    name: str
    source: StoredTensor
    qtype: T
    why: str = ""
    free: bool = False

    @property
    def nbytes(self) -> int:
        size, width = GGML_QUANT_SIZES[self.qtype]
        return self.source.numel // size * width

    @property
    def bits(self) -> float:
        """Bits a weight."""
        size, width = GGML_QUANT_SIZES[self.qtype]
        return 8 * width / size


@dataclass(frozen=True)
class Plan:
    """What will be written. notes: lines for the person: what was left out, what fell back."""

    source: Source
    architecture: Architecture
    recipe: Recipe
    choices: tuple[Choice, ...]
    notes: tuple[str, ...]

    @property
    def file_type(self) -> LlamaFileType:
        """`general.file_type`; of 16 bits, the one that most tensors have."""
        if self.recipe.base is not None:
            return self.recipe.file_type
        types = [choice.qtype for choice in self.choices]
        halves = types.count(T.F16) > types.count(T.BF16)
        return LlamaFileType.MOSTLY_F16 if halves else LlamaFileType.MOSTLY_BF16

    @property
    def nbytes(self) -> int:
        """Of all tensors; the header comes on top."""
        return sum(choice.nbytes for choice in self.choices)


def make_plan(
    source: Source,
    recipe: Recipe,
    overrides: Iterable[tuple[str, T]] = (),
    architecture: str | None = None,
    prefix: str | None = None,
) -> Plan:
    """Types for all tensors of `source`.

    overrides: (pattern of a new name, type), as a shell's `*.qkv.weight`; the first that fits goes
    before the recipe. architecture: a tag, where names do not tell. prefix: take only the tensors
    whose names begin so, and strip it; None: the diffusion model's, if there is one.

    Raises: GGUFError where nothing is left to write, or a type cannot be written.
    """
    tensors, notes = _select(source, prefix)
    row = _architecture(source, tensors, architecture, notes)
    roles = _places(tensors)
    overrides = tuple(overrides)
    choices = []
    for name, tensor in tensors.items():
        if (choice := _choose(name, tensor, row, recipe, overrides, roles)) is None:
            notes.append(f"left out: {name}, since GGUF has no type for {tensor.label}")
        else:
            choices.append(choice)
    if unused := [glob for glob, _ in overrides if not fnmatch.filter(tensors, glob)]:
        raise GGUFError(f"{source.path}: no tensor's name fits {unused[0]!r}")
    _check_types(choices)
    notes += _fallback_notes(choices)
    return Plan(source, row, recipe, tuple(choices), tuple(notes))


def _select(source: Source, prefix: str | None) -> tuple[dict[str, StoredTensor], list[str]]:
    """(tensors by their new names, notes on those left out)"""
    if not source.tensors:
        raise GGUFError(f"{source.path}: holds no tensors: get another file")
    chosen = prefix_of(source.tensors) if prefix is None else prefix
    inside = named(source, chosen)
    if not inside:
        raise GGUFError(f"{source.path}: no tensor's name begins with {chosen!r}")
    if "spiece_model" in inside:
        raise GGUFError(
            f"{source.path}: the vocabulary in it (umT5, Gemma) cannot be converted: get a GGUF "
            "made by llama.cpp's convert_hf_to_gguf.py; that one can be quantised again"
        )
    left: dict[str, int] = defaultdict(int)
    for name in source.tensors:
        if not name.startswith(chosen):
            part = (p for p, begins in OTHER_PARTS.items() if name.startswith(begins))
            left[next(part, "other")] += 1
    notes = [f"left out: {count} tensors ({part})" for part, count in left.items()]
    return inside, [*source.notes, *notes]


def named(source: Source, prefix: str) -> dict[str, StoredTensor]:
    """The tensors whose names begin with `prefix`, as they are called in a GGUF file."""
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in source.tensors.items()
        if name.startswith(prefix)
    }
    rename = RENAMERS.get(find_architecture(inside).tag)
    return inside if rename is None else {new: inside[old] for old, new in rename(inside).items()}


def _architecture(
    source: Source, names: Mapping[str, object], tag: str | None, notes: list[str]
) -> Architecture:
    if tag is not None:
        return architecture_named(tag)
    prefix = prefix_of(names)  # of a checkpoint that is taken whole
    found = find_architecture({name.removeprefix(prefix) for name in names})
    if found is not UNKNOWN:
        return found
    if is_diffusers(names):
        raise GGUFError(
            f"{source.path}: the tensors have diffusers' names, which GGUF loaders cannot place: "
            "take the model's original file, or load it in ComfyUI and save it with ModelSave"
        )
    if "transformer.resblocks.0.ln_1.weight" in names:
        raise GGUFError(
            f"{source.path}: the tensors have OpenCLIP's names, which GGUF loaders cannot place: "
            "take its own file (clip_g.safetensors), or save it in ComfyUI with CLIPSave"
        )
    if source.architecture:
        return Architecture(source.architecture, "the source's own tag", (), UNKNOWN.keep)
    notes.append(
        "the architecture is not recognised: FewStep goes by names and may load the file, "
        "ComfyUI-GGUF will not; --arch NAME sets the tag"
    )
    return UNKNOWN


def _choose(
    name: str,
    tensor: StoredTensor,
    row: Architecture,
    recipe: Recipe,
    overrides: tuple[tuple[str, T], ...],
    places: Mapping[str, tuple[str, int, int]],
) -> Choice | None:
    """None: GGUF has no type for it."""
    if tensor.qtype in _INTEGERS or tensor.label in ("U8", "BOOL"):
        return None if tensor.qtype is None else Choice(name, tensor, tensor.qtype, "integers")
    for glob, qtype in overrides:
        if fnmatch.fnmatchcase(name, glob):
            return Choice(name, tensor, _fitting(tensor, qtype), f"asked for by {glob}")
    if kept := _kept(name, tensor, row):
        qtype, why = kept
        return Choice(name, tensor, T.F32 if recipe.base is T.F32 else qtype, why)
    wanted, why = recipe.base, ""
    if name in places:
        role, i, n = places[name]
        for rule in recipe.rules:
            if rule.role == role and PLACES[rule.place](i, n):
                wanted, why = rule.qtype, role
                break
    if wanted is None:
        return Choice(name, tensor, _half(tensor), free=True)
    if wanted in QTYPES and tensor.qtype in QTYPES and _bits(tensor.qtype) <= _bits(wanted):
        return Choice(name, tensor, tensor.qtype, "no larger in the source: copied", True)
    fitting = _fitting(tensor, wanted)
    if fitting is not wanted:
        why = f"rows of {tensor.cols} are not whole {wanted.name} blocks"
    return Choice(name, tensor, fitting, why, True)


def _kept(name: str, tensor: StoredTensor, row: Architecture) -> tuple[T, str] | None:
    """(type, why) of a tensor that no recipe touches."""
    if len(tensor.shape) < 2 or tensor.numel <= SMALL:
        return T.F32, "small"
    if any(part in name for part in row.exact):
        return T.F32, "exact"
    stored = _before_loras(tensor)
    if stored in QTYPES and (_delicate(name, row) or len(tensor.shape) > 2):
        return stored, "delicate: as in the source"
    if not name.endswith(".weight") or len(tensor.shape) not in (2, 4):
        # A bare parameter or a 1- or 3-D convolution: city96's loader does not unpack their bf16.
        small = tensor.numel <= LARGE_PARAMETER and tensor.qtype is not T.F16
        return (T.F32 if small else T.F16), "parameter"
    if _delicate(name, row):
        return _half(tensor), "delicate"
    if len(tensor.shape) > 2:
        return _half(tensor), "convolution"
    return None


def _delicate(name: str, row: Architecture) -> bool:
    return any(part in name for part in row.keep)


def _before_loras(tensor: StoredTensor) -> T | None:
    """Its type in the source, LoRAs or none: 'Q8_0 + LoRA' was Q8_0."""
    return T.__members__.get(tensor.label.partition(" + ")[0])


def _half(tensor: StoredTensor) -> T:
    return T.BF16 if tensor.label.startswith("BF16") else T.F16


def _bits(qtype: T) -> float:
    size, width = GGML_QUANT_SIZES[qtype]
    return 8 * width / size


def _fitting(tensor: StoredTensor, wanted: T) -> T:
    """`wanted`, or the next type whose blocks divide the rows."""
    while tensor.cols % GGML_QUANT_SIZES[wanted][0]:
        wanted = FALLBACKS.get(wanted) or _half(tensor)
    return wanted


def _places(names: Iterable[str]) -> dict[str, tuple[str, int, int]]:
    """name -> (role, its number among the n of that role, n), numbers in names counted as such."""
    by_role: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if (role := role_of(name)) is not None:
            by_role[role].append(name)
    places = {}
    for role, members in by_role.items():
        members.sort(key=lambda name: [int(p) if p.isdigit() else p for p in _split(name)])
        places |= {name: (role, i, len(members)) for i, name in enumerate(members)}
    return places


def _split(name: str) -> list[str]:
    """Text and numbers in turn, so that two names compare part by part."""
    return re.split(r"(\d+)", name)


def _check_types(choices: list[Choice]) -> None:
    writable = writable_types()
    for choice in choices:
        if choice.qtype not in writable and choice.qtype is not choice.source.qtype:
            names = ", ".join(qtype.name for qtype in writable)
            raise GGUFError(
                f"{choice.source.path}: tensor {choice.name!r} would be {choice.qtype.name}, "
                f"which can be read but not written (writable: {names})"
            )


def _fallback_notes(choices: list[Choice]) -> list[str]:
    """One line for each kind of fallback, with its first tensor."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for choice in choices:
        if choice.why.startswith("rows of"):
            found[choice.why, choice.qtype.name].append(choice.name)
    return [
        f"{why}: {len(names)} tensors are {qtype} instead, {names[0]} first"
        for (why, qtype), names in found.items()
    ]
