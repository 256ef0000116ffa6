"""Write a GGUF file, tensor by tensor, so that it appears whole or not at all.

Over gguf-py's GGUFWriter, which knows the layout. The header needs each tensor's type and shape
beforehand, not its data: give the data as a function to stream a model larger than memory.
"""

import glob
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
)
from torch import Tensor

from .errors import GGUFError
from .header import DTYPES, MAX_DIMS
from .reader import ORIG_SHAPE
from .types import PLAIN_QTYPES, PLAIN_TYPES, find_type

Blocks = Tensor | Callable[[], Tensor]
NamedTensor = tuple[str, Tensor | tuple[Blocks, GGMLQuantizationType, Sequence[int]]]

_GGML_DIMS = 4  # GGML_MAX_DIMS of ggml.h
_ORPHAN = re.compile(r"\.(\d+)-[0-9a-f]{8}\.tmp")  # the process that wrote it
_ORPHAN_AGE = 60  # seconds since the last write; one that is written to is no orphan
_VALUE_TYPES = {dtype: GGUFValueType(kind) for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written: its header line, and its data or what makes them."""

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    data: Blocks

    @property
    def nbytes(self) -> int:
        block_size, type_size = GGML_QUANT_SIZES[self.qtype]
        return math.prod(self.shape) // block_size * type_size

    def stored_shape(self, most: int) -> tuple[int, ...]:
        """`shape` in at most `most` dimensions, the outermost folded into one; flat where its rows
        are not whole blocks. Where it differs, `ORIG_SHAPE` keeps `shape`.
        """
        if self.shape and self.shape[-1] % GGML_QUANT_SIZES[self.qtype][0]:
            return (math.prod(self.shape),)
        folded = max(0, len(self.shape) - most) + 1
        return (math.prod(self.shape[:folded]), *self.shape[folded:]) if self.shape else ()


def write_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    metadata: Mapping[str, object],
    tensors: Iterable[NamedTensor],
) -> None:
    """Write `path`, replacing a file of that name once the new one is whole and on the disk.

    metadata: text, bool, int (uint32; int32 if negative; 64 bits if larger), float (float32), a
    list of one of these (ints as int32 or int64), or numpy scalars and arrays, whose dtype decides.
    tensors: (name, plain tensor) or (name, (blocks, qtype, shape)), where blocks is uint8 or a
    function that makes it when its turn comes. A tensor whose rows are not whole blocks is stored
    flat, and the outer dimensions of one with more than `_most_dims` as one; its shape is then in
    `comfy.gguf.orig_shape.<name>`.

    Raises: GGUFError for what cannot be written. Whatever goes wrong, nothing is left behind; what
    a killed process left is removed by the next that writes there.
    """
    path = Path(path)
    # Beside the target, since only a rename within a folder is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        _remove_orphans(path)
        entries = _entries(tensors)
        with closing(GGUFWriter(temporary, architecture)) as writer:
            _add_metadata(writer, architecture, metadata, entries)
            _write(writer, entries, _most_dims(metadata, entries))
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise GGUFError(f"{path}: cannot be written: {error.strerror or error}") from error
    except (GGUFError, OverflowError, UnicodeEncodeError) as error:
        raise GGUFError(f"{path}: {error}") from error
    finally:
        with suppress(OSError):  # it is not there, or its name cannot be
            temporary.unlink()


def _entries(tensors: Iterable[NamedTensor]) -> list[_Entry]:
    entries = [_entry(name, data) for name, data in tensors]
    names = {entry.name for entry in entries}
    if len(names) < len(entries):
        raise GGUFError("two tensors have the same name")
    return entries


def _entry(name: str, given: Tensor | tuple[Blocks, GGMLQuantizationType, Sequence[int]]) -> _Entry:
    if isinstance(given, Tensor):
        if given.dtype not in PLAIN_QTYPES:
            raise GGUFError(f"tensor {name!r} is {given.dtype}, which GGUF does not store")
        return _Entry(name, PLAIN_QTYPES[given.dtype], tuple(given.shape), given)
    blocks, qtype, shape = given
    entry = _Entry(name, find_type(qtype), tuple(shape), blocks)
    block_size = GGML_QUANT_SIZES[entry.qtype][0]
    if math.prod(entry.shape) % block_size:
        raise GGUFError(
            f"tensor {name!r}: {entry.qtype.name} packs {block_size} weights a block, "
            f"which does not divide {entry.shape}"
        )
    return entry


def _add_metadata(
    writer: GGUFWriter, architecture: str, metadata: Mapping[str, object], entries: list[_Entry]
) -> None:
    """Fields in the order given, after the architecture, which GGUFWriter has added."""
    fields = dict(metadata)
    if fields.pop("general.architecture", architecture) != architecture:
        raise GGUFError("the metadata names another general.architecture")
    fields.pop("general.alignment", None)  # of the file that the metadata came from
    if any(entry.qtype not in PLAIN_TYPES for entry in entries):
        fields.setdefault("general.quantization_version", GGML_QUANT_VERSION)
    most = _most_dims(metadata, entries)
    for entry in entries:
        if entry.stored_shape(most) != entry.shape:
            fields[ORIG_SHAPE + entry.name] = np.array(entry.shape, np.int32)
    for key, value in fields.items():
        writer.add_key_value(key, *_typed(key, value))


def _most_dims(metadata: Mapping[str, object], entries: list[_Entry]) -> int:
    """ggml's four, or five where the file has no list in its metadata.

    Video models' files are published with the five dimensions of their convolutions, and all read
    them so. But ggml refuses such a file, and what stable-diffusion.cpp then reads it with
    (`gguf_reader_ext.h`) fails at a list. Folded, both read it, and the list too.
    """
    lists = any(isinstance(value, list | tuple | np.ndarray) for value in metadata.values())
    kept = all(entry.stored_shape(MAX_DIMS) == entry.shape for entry in entries)
    return MAX_DIMS if kept and not lists else _GGML_DIMS


def _typed(key: str, value: object) -> tuple[object, GGUFValueType, GGUFValueType | None]:
    """(plain value, its GGUF type, its elements' type if it is an array)"""
    if isinstance(value, list | tuple):
        return list(value), GGUFValueType.ARRAY, _element_type(key, value)
    if not isinstance(value, np.ndarray | np.generic):
        return value, _scalar_type(key, value, GGUFValueType.UINT32), None
    if value.dtype not in _VALUE_TYPES or value.ndim > 1 or not value.size:
        raise GGUFError(f"field {key!r} is not a list of numbers, or is empty")
    kind = _VALUE_TYPES[value.dtype]
    plain = value.tolist()
    return (plain, GGUFValueType.ARRAY, kind) if value.ndim else (plain, kind, None)


def _element_type(key: str, values: Sequence[object]) -> GGUFValueType:
    kinds = {_scalar_type(key, value, GGUFValueType.INT32) for value in values}
    if kinds == {GGUFValueType.INT32, GGUFValueType.INT64}:
        return GGUFValueType.INT64
    if len(kinds) != 1:
        raise GGUFError(f"field {key!r} mixes types, or is empty")
    return kinds.pop()


def _scalar_type(key: str, value: object, int_type: GGUFValueType) -> GGUFValueType:
    """The type for a value of Python's own; `int_type`: the first choice for whole numbers."""
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, str):
        return GGUFValueType.STRING
    if isinstance(value, float):
        return GGUFValueType.FLOAT32
    if isinstance(value, int):
        if int_type is GGUFValueType.UINT32 and 0 <= value < 2**32:
            return GGUFValueType.UINT32
        if -(2**31) <= value < 2**31:
            return GGUFValueType.INT32
        if -(2**63) <= value < 2**63:
            return GGUFValueType.INT64
    raise GGUFError(f"field {key!r} has a value that GGUF does not store: {value!r:.80}")


def _write(writer: GGUFWriter, entries: list[_Entry], most: int) -> None:
    for entry in entries:
        # Any dtype but uint8 makes add_tensor_info take the shape as weights, not as bytes.
        writer.add_tensor_info(
            entry.name, entry.stored_shape(most), np.dtype(np.float32), entry.nbytes, entry.qtype
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_bytes(entry))


def _bytes(entry: _Entry) -> np.ndarray:
    """1-D uint8: what goes into the file."""
    data = entry.data if isinstance(entry.data, Tensor) else entry.data()
    flat = data.detach().cpu().contiguous().view(-1).view(torch.uint8)
    if flat.numel() != entry.nbytes:
        raise GGUFError(
            f"tensor {entry.name!r}: {entry.qtype.name} of shape {entry.shape} "
            f"takes {entry.nbytes} bytes, not {flat.numel()}"
        )
    return flat.numpy()


def _sync(path: Path) -> None:
    """Have the file's bytes on the disk before its name, or a crash could leave an empty file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _remove_orphans(path: Path) -> None:
    """Delete temporary files for `path` whose process is gone and that nobody has written to."""
    start = f".{path.name}"
    for found in path.parent.glob(glob.escape(start) + ".*.tmp"):
        match = _ORPHAN.fullmatch(found.name.removeprefix(start))
        if match is None or not _gone(int(match[1])):
            continue
        with suppress(FileNotFoundError, PermissionError):  # Windows keeps files that are open
            if time.time() - found.stat().st_mtime > _ORPHAN_AGE:
                found.unlink()


def _gone(process: int) -> bool:
    """Whether there is no such process; on Windows, where asking would end it, always true."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        return False
    return False
