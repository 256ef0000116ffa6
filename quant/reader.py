"""Open a GGUF file: its metadata and tensors by name, mapped, and nothing read before its use.

The mapping is private and copy-on-write: torch wants writable memory, an in-place change to a
tensor stays in this process and never reaches the file, and pages that are only read remain the
system's clean file cache.
"""

import itertools
import math
import mmap
import os
import sys
from typing import BinaryIO, NamedTuple

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from torch import Tensor

from . import sniff
from .dequant import as_plain
from .errors import DAMAGED, GGUFError
from .header import Header, TensorEntry, parse_header
from .metadata import Metadata
from .types import PLAIN_TYPES, find_type

ORIG_SHAPE = "comfy.gguf.orig_shape."  # + tensor name: its shape, where the file's differs (city96)
_SHAPE_TYPES = (GGUFValueType.INT32, GGUFValueType.UINT32, GGUFValueType.INT64)
_MAX_ORIG_DIMS = 16
_MAX_WEIGHTS = 2**59  # keeps every byte count and stride within int64
# Linux on x86, ARM and RISC-V; Python names it from 3.13 on. Without it the kernel refuses a
# private mapping larger than its memory, though no page of it will be written.
_MAP_NORESERVE = 0x4000


class TensorInfo(NamedTuple):
    """A tensor's place and meaning. `shape` outermost first; `offset` from the file's begin."""

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def is_quantized(self) -> bool:
        return self.qtype not in PLAIN_TYPES


class GGUFFile:
    """A mapped GGUF file.

    path: as text; version; metadata: mapping of fields, arrays decoded on access; tensors: infos
    by name, in the file's order. The map lives as long as this object or a tensor over it; `close`
    (or leaving a `with`) drops this object's share.

    Raises: GGUFError, one line with the file's name and the remedy, for whatever is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                size = _check_magic(file)
                self._map: mmap.mmap | None = _map(file)
            header = parse_header(self._map)
            self.version: int = header.version
            self.metadata = Metadata(self.path, self._map, header.fields)
            _refuse_parts(header)
            infos = [_tensor_info(entry, header, self.metadata) for entry in header.tensors]
            _check_places(infos, header.data_start, size)
            self.tensors: dict[str, TensorInfo] = {info.name: info for info in infos}
        except OSError as error:
            raise GGUFError(f"{self.path}: {error.strerror or error}") from error
        except GGUFError as error:
            raise GGUFError(f"{self.path}: {error}") from error

    @property
    def architecture(self) -> str | None:
        """`general.architecture`, a hint; None where the file does not say."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else None

    def blocks(self, name: str) -> Tensor:
        """The tensor's bytes over the map: (rows, bytes of a row) uint8.

        (1, nbytes) where the rows of `shape` are not whole blocks; see ORIG_SHAPE.
        """
        info = self._info(name)
        block_size, type_size = GGML_QUANT_SIZES[info.qtype]
        flat = self._bytes(info)
        row = info.shape[-1] if info.shape else 1
        if row % block_size:
            return flat.view(1, -1)
        return flat.view(math.prod(info.shape[:-1]), row // block_size * type_size)

    def tensor(self, name: str) -> Tensor:
        """The tensor itself over the map, for plain types.

        Raises: GGUFError where it is quantised; then `dequantize(file.blocks(name), …)`.
        """
        info = self._info(name)
        if info.is_quantized:
            raise GGUFError(f"{self.path}: tensor {name!r} is {info.qtype.name}: dequantise it")
        return as_plain(self._bytes(info), PLAIN_TYPES[info.qtype]).view(info.shape)

    def close(self) -> None:
        """Drop the map; tensors over it keep it alive for themselves."""
        self._map = None
        self.metadata.release()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: there is no tensor {name!r}")
        return self.tensors[name]

    def _bytes(self, info: TensorInfo) -> Tensor:
        if self._map is None:
            raise GGUFError(f"{self.path}: tensor {info.name!r} was asked for after closing")
        if info.nbytes == 0:  # frombuffer refuses an empty one
            return torch.empty(0, dtype=torch.uint8)
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        width = 1 if info.is_quantized else GGML_QUANT_SIZES[info.qtype][1]
        return flat.clone() if info.offset % width else flat  # of an odd general.alignment


def _check_magic(file: BinaryIO) -> int:
    """The file's size in bytes, once it is known to begin as GGUF does."""
    size, head = os.fstat(file.fileno()).st_size, file.read(64)
    if not head:
        raise GGUFError("the file is empty: download it again")
    if not head.startswith(b"GGUF"):
        raise GGUFError(f"not a GGUF file but {sniff.describe(head)}")
    return size


def _map(file: BinaryIO) -> mmap.mmap:
    if sys.platform == "linux":
        return mmap.mmap(
            file.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _refuse_parts(header: Header) -> None:
    count = header.fields.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise GGUFError(
            f"one of {count} parts of a model: merge them with "
            "`llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf` and load the whole"
        )


def _tensor_info(entry: TensorEntry, header: Header, metadata: Metadata) -> TensorInfo:
    try:
        qtype = find_type(entry.type_number)
    except GGUFError as error:
        raise GGUFError(f"tensor {entry.name!r}: {error}") from error
    shape = _shape(entry, metadata)
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    row, weights = (entry.dims or (1,))[0], math.prod(entry.dims)
    if row % block_size:
        raise GGUFError(
            f"tensor {entry.name!r}: {qtype.name} packs {block_size} weights a block, "
            f"which does not divide its rows of {row}"
        )
    if entry.offset % header.alignment:
        raise GGUFError(
            f"tensor {entry.name!r} lies at {entry.offset}, "
            f"not a multiple of the alignment {header.alignment}; {DAMAGED}"
        )
    nbytes = weights // block_size * type_size
    return TensorInfo(entry.name, qtype, shape, header.data_start + entry.offset, nbytes)


def _shape(entry: TensorEntry, metadata: Metadata) -> tuple[int, ...]:
    """Outermost first: the shape that the metadata gives, else the file's dimensions reversed."""
    stored = entry.dims[::-1]
    _check_shape(entry.name, stored)
    key = ORIG_SHAPE + entry.name
    if key not in metadata:
        return stored
    shape = tuple(metadata[key]) if metadata.element_type(key) in _SHAPE_TYPES else ()
    _check_shape(entry.name, shape)
    if math.prod(shape) != math.prod(stored) or not 0 < len(shape) <= _MAX_ORIG_DIMS:
        raise GGUFError(f"field {key!r} does not fit the tensor's {stored}; {DAMAGED}")
    return shape


def _check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Sizes are real: even those that a 0 beside them hides, since torch multiplies strides."""
    weights = 1
    for dim in shape:
        weights *= dim or 1
        if dim < 0 or weights > _MAX_WEIGHTS:
            raise GGUFError(f"tensor {name!r} has the impossible shape {shape}; {DAMAGED}")


def _check_places(infos: list[TensorInfo], data_start: int, size: int) -> None:
    """Tensors lie apart from one another and within the file."""
    filled = sorted((info for info in infos if info.nbytes), key=lambda info: info.offset)
    for first, second in itertools.pairwise(filled):
        if first.offset + first.nbytes > second.offset:
            raise GGUFError(f"tensors {first.name!r} and {second.name!r} overlap; {DAMAGED}")
    if not filled or (end := filled[-1].offset + filled[-1].nbytes) <= size:
        return
    if data_start + sum(info.nbytes for info in filled) <= size:
        raise GGUFError(f"tensor {filled[-1].name!r} lies beyond the file's end; {DAMAGED}")
    cut = next(info for info in filled if info.offset + info.nbytes > size)
    raise GGUFError(
        f"{end - size} of {end} bytes are missing, from tensor {cut.name!r} on: "
        "the download is incomplete: download it again"
    )
