"""What can be quantised: a safetensors file or its shards, or a GGUF file, as tensors by name."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES

from . import sniff
from .errors import ANEW, GGUFError
from .header import DTYPES as ARRAY_DTYPES
from .reader import ORIG_SHAPE, GGUFFile
from .safetensors_file import BESIDE, MARKER, join_scales, read_header
from .stored import StoredTensor, block_decoder, plain_decoder
from .types import PLAIN_TYPES

_SHARD = re.compile(
    r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.safetensors|\.sft)"
)
_INDEX = ".safetensors.index.json"
_SHOWN = 10  # missing shards that are named
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# Fields of a GGUF file that describe its own bytes, not the model.
OF_THE_FILE = ("general.architecture", "general.file_type", "general.quantization_version",
               "general.alignment", "split.", ORIG_SHAPE)  # fmt: skip
# A safetensors header's texts -> GGUF's keys (gguf.md; the Model Spec's keys).
_MODELSPEC = {
    "modelspec.title": "general.name",
    "modelspec.author": "general.author",
    "modelspec.license": "general.license",
    "modelspec.description": "general.description",
}


@dataclass
class Source:
    """A model's tensors by name, in the file's order, and what it says of itself.

    files: where they lie. metadata: fields for a GGUF file made from this one. architecture: the
    file's own tag, or None. notes: lines for the person.
    """

    path: str
    tensors: dict[str, StoredTensor]
    files: tuple[str, ...] = ()
    metadata: dict[str, object] = field(default_factory=dict)
    architecture: str | None = None
    notes: tuple[str, ...] = ()


def open_source(path: str | os.PathLike[str]) -> Source:
    """The model in a .gguf or .safetensors file, or in the shards of an index or a first shard.

    Raises: GGUFError, one line with the remedy: missing, a pickle, truncated, of another kind.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise GGUFError(f"{path}: a folder: name the model's file in it")
    if path.lower().endswith(_PICKLES):
        raise GGUFError(
            f"{path}: a pickle (.ckpt, .pt, .bin) can run code when it is opened and is refused: "
            "get the model as .safetensors, or load it in ComfyUI and save it with ModelSave"
        )
    head = _head(path)
    if path.endswith(_INDEX) or (path.endswith(".json") and head.startswith(b"{")):
        names = _indexed(path)
        return _from_shards(path, _beside(path, names.values()), names)
    if head.startswith(b"GGUF"):
        return _from_gguf(path)
    if (match := _SHARD.fullmatch(path)) is not None:
        return _from_shards(path, _numbered(match))
    if head[8:9] != b"{":
        what = sniff.describe(head, ANEW) if head else "empty: download it again"
        raise GGUFError(f"{path}: neither GGUF nor safetensors but {what}")
    tensors, texts = read_header(path)
    return Source(path, tensors, (path,), _metadata_from_texts(texts))


def is_gguf(path: str) -> bool:
    """By its first bytes, whatever its name."""
    return _head(path).startswith(b"GGUF")


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror or error}") from error


def _indexed(path: str) -> dict[str, str]:
    """An index file's own: tensor -> its shard's name."""
    try:
        names = json.loads(Path(path).read_bytes())["weight_map"]
        return {name: os.path.basename(shard) for name, shard in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise GGUFError(f"{path}: not the index of a sharded model: download it again") from error


def _beside(path: str, names: Iterable[str]) -> list[str]:
    return [os.path.join(os.path.dirname(path), name) for name in sorted(set(names))]


def _numbered(match: re.Match[str]) -> list[str]:
    count = int(match["count"])
    if not 0 < int(match["number"]) <= count:
        raise GGUFError(f"{match[0]}: no shard has this number: download the model again")
    numbers = (f"{match['stem']}-{n:05}-of-{count:05}{match['end']}" for n in range(1, count + 1))
    return list(numbers)


def _from_shards(path: str, shards: list[str], names: Iterable[str] = ()) -> Source:
    """names: tensors that must be in one of the shards."""
    missing = [os.path.basename(shard) for shard in shards if not os.path.isfile(shard)]
    if missing:
        told = ", ".join(missing[:_SHOWN] + ["…"] * (len(missing) > _SHOWN))
        raise GGUFError(f"{path}: shards are missing beside it: {told}: get them all")
    tensors: dict[str, StoredTensor] = {}
    texts: dict[str, str] = {}
    for shard in shards:
        part, said = read_header(shard)
        if twice := tensors.keys() & part.keys():
            raise GGUFError(f"{shard}: tensor {min(twice)!r} is in another shard too")
        tensors |= part
        texts |= said
    for name in names:
        if name not in tensors and not name.endswith((*BESIDE, MARKER)):
            raise GGUFError(f"{path}: tensor {name!r} is in none of its shards: get them all anew")
    return Source(path, join_scales(tensors), tuple(shards), _metadata_from_texts(texts))


def _metadata_from_texts(texts: Mapping[str, str]) -> dict[str, object]:
    """Of a safetensors header what others read: ComfyUI's own keys (`config`, …) have no dot."""
    known = {_MODELSPEC[key]: text for key, text in texts.items() if text and key in _MODELSPEC}
    own = {key: text for key, text in texts.items() if "." not in key and key != "format"}
    own.pop("_quantization_metadata", None)  # about fp8 weights, which are fp8 no more
    return known | own


def _from_gguf(path: str) -> Source:
    with GGUFFile(path) as file:
        tensors = {name: _stored(path, info) for name, info in file.tensors.items()}
        return Source(path, tensors, (path,), _fields(file), file.architecture)


def _stored(path: str, info) -> StoredTensor:
    plain = PLAIN_TYPES.get(info.qtype)
    return StoredTensor(
        path=path,
        name=info.name,
        shape=info.shape,
        label=info.qtype.name,
        offset=info.offset,
        nbytes=info.nbytes,
        block=GGML_QUANT_SIZES[info.qtype],
        decode=block_decoder(info.qtype) if plain is None else plain_decoder(plain),
        qtype=info.qtype,
    )


def _fields(file: GGUFFile) -> dict[str, object]:
    """The metadata that stays true of a file made from this one; arrays keep their dtype."""
    fields: dict[str, object] = {}
    for key in file.metadata:
        if key.startswith(OF_THE_FILE):
            continue
        value, kind = file.metadata[key], file.metadata.element_type(key)
        if value == []:  # GGUFWriter cannot write an empty array
            continue
        fields[key] = np.array(value, ARRAY_DTYPES[kind]) if kind in ARRAY_DTYPES else value
    return fields
