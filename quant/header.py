"""Parse a GGUF header from a buffer; nothing of the tensors' data is touched.

Source: ggml `docs/gguf.md`. Header = magic | version u32 | tensors u64 | fields u64 | fields |
tensor infos | padding to `general.alignment`. A field = key | type u32 | value; a string = length
u64 | UTF-8 bytes; an array = element type u32 | count u64 | elements.

gguf-py makes numpy views for each element of each array, which takes many seconds for a tokenizer.
Here an array is stepped over and remembered by its place, to be decoded when asked for. Every count
and length is checked against the bytes that are left before anything is allocated.
"""

import struct
from collections.abc import Mapping
from mmap import mmap
from typing import NamedTuple

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from .errors import DAMAGED, GGUFError

Scalar = int | float | bool | str
Buffer = bytes | mmap

MAX_DIMS = 5  # ggml has four; tools for video models write convolutions with five
MAX_STRING = 2**28  # bytes
_VERSIONS = (2, 3)
_MAX_NAME = 2**16 - 1  # bytes; gguf.md's bound for keys
_MAX_STRINGS = 2**24  # in an array; a tokenizer has at most a few 2**18
_MIN_FIELD = 8 + 4 + 1  # bytes: empty key, type, one byte
_MIN_TENSOR = 8 + 4 + 4 + 8  # bytes: empty name, no dimensions, type, offset

# struct's and numpy's letters for these agree.
_LETTERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_COUNTS, _TYPE_AND_COUNT = struct.Struct("<QQ"), struct.Struct("<IQ")
_SCALARS = {int(kind): struct.Struct("<" + letter) for kind, letter in _LETTERS.items()}
DTYPES = {int(kind): np.dtype("<" + letter) for kind, letter in _LETTERS.items()}
_TENSOR_TAILS = [struct.Struct(f"<{n}QIQ") for n in range(MAX_DIMS + 1)]


class Array(NamedTuple):
    """An array not yet decoded: its element type, count, and the offset of its first element."""

    kind: int
    count: int
    offset: int


class TensorEntry(NamedTuple):
    """A tensor as the header has it: `dims` innermost first, `offset` within the data."""

    name: str
    dims: tuple[int, ...]
    type_number: int
    offset: int


class Header(NamedTuple):
    """What `parse_header` found; `data_start`: bytes from the file's begin."""

    version: int
    fields: dict[str, Scalar | Array]
    tensors: list[TensorEntry]
    alignment: int
    data_start: int


class Cursor:
    """A place in a buffer that moves on as it is read."""

    def __init__(self, buffer: Buffer, offset: int = 0):
        self.buffer, self.offset, self.end = buffer, offset, len(buffer)

    def unpack(self, form: struct.Struct) -> tuple:
        """Raises: struct.error where the buffer ends too early."""
        values = form.unpack_from(self.buffer, self.offset)
        self.offset += form.size
        return values

    def text(self, what: str, longest: int) -> str:
        (length,) = self.unpack(_U64)
        start, self.offset = self.offset, self.offset + length
        if length > longest or self.offset > self.end:
            raise GGUFError(f"{what} claims a length of {length} bytes; {DAMAGED}")
        try:
            return self.buffer[start : self.offset].decode()
        except UnicodeDecodeError as error:
            raise GGUFError(f"{what} is not UTF-8; {DAMAGED}") from error

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count whose items cannot fit in what is left."""
        if count > (self.end - self.offset) // least_bytes:
            size = f"a file of {self.end} bytes"
            raise GGUFError(f"{count} {what} cannot fit in {size}; {DAMAGED}")


def parse_header(buffer: Buffer) -> Header:
    """Read the header that follows the magic at byte 0.

    Raises: GGUFError, without the file's name, for all that is malformed in it.
    """
    try:
        return _parse(Cursor(buffer, offset=4))
    except struct.error as error:
        raise GGUFError(f"the header is cut off; {DAMAGED}") from error


def _parse(cursor: Cursor) -> Header:
    version = _read_version(cursor)
    tensor_count, field_count = cursor.unpack(_COUNTS)
    cursor.check_count(tensor_count, _MIN_TENSOR, "tensors")
    cursor.check_count(field_count, _MIN_FIELD, "metadata fields")
    fields = _read_fields(cursor, field_count)
    tensors = _read_tensors(cursor, tensor_count)
    alignment = _alignment(fields)
    data_start = -(-cursor.offset // alignment) * alignment
    return Header(version, fields, tensors, alignment, data_start)


def _read_version(cursor: Cursor) -> int:
    (version,) = cursor.unpack(_U32)
    if version in _VERSIONS:
        return version
    if version & 0xFFFF == 0 and version:
        raise GGUFError("byte-swapped (big-endian) GGUF: convert it to little-endian")
    raise GGUFError(
        f"GGUF version {version} is not one of those known, {_VERSIONS}: "
        "convert the file with a current llama.cpp, or update FewStep if the version is newer"
    )


def _read_fields(cursor: Cursor, count: int) -> dict[str, Scalar | Array]:
    fields: dict[str, Scalar | Array] = {}
    for _ in range(count):
        key = cursor.text("a metadata key", _MAX_NAME)
        (kind,) = cursor.unpack(_U32)
        if key in fields:
            raise GGUFError(f"field {key!r} occurs twice; {DAMAGED}")
        if scalar := _SCALARS.get(kind):
            (fields[key],) = cursor.unpack(scalar)
        elif kind == GGUFValueType.STRING:
            fields[key] = cursor.text(f"field {key!r}", MAX_STRING)
        elif kind == GGUFValueType.ARRAY:
            fields[key] = _step_over_array(cursor, key)
        else:
            raise GGUFError(f"field {key!r} has the unknown type {kind}; {DAMAGED}")
    return fields


def _step_over_array(cursor: Cursor, key: str) -> Array:
    kind, count = cursor.unpack(_TYPE_AND_COUNT)
    array = Array(kind, count, cursor.offset)
    if kind in DTYPES:
        size = DTYPES[kind].itemsize
        cursor.check_count(count, size, f"entries of field {key!r}")
        cursor.offset += count * size
    elif kind == GGUFValueType.STRING:
        cursor.check_count(count, _U64.size, f"entries of field {key!r}")
        if count > _MAX_STRINGS:
            raise GGUFError(f"field {key!r} claims {count} strings; {DAMAGED}")
        cursor.offset = _end_of_strings(cursor.buffer, cursor.offset, count, key)
    elif kind == GGUFValueType.ARRAY:
        raise GGUFError(f"field {key!r} nests arrays, which ggml does not read either")
    else:
        raise GGUFError(f"field {key!r} has entries of the unknown type {kind}; {DAMAGED}")
    return array


def _end_of_strings(buffer: Buffer, offset: int, count: int, key: str) -> int:
    """The offset after `count` strings: the one loop over a tokenizer's entries, so kept tight."""
    length_at, end = _U64.unpack_from, len(buffer)
    for _ in range(count):
        offset += 8 + length_at(buffer, offset)[0]
        if offset > end:
            raise GGUFError(f"a string of field {key!r} ends beyond the file; {DAMAGED}")
    return offset


def _read_tensors(cursor: Cursor, count: int) -> list[TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for _ in range(count):
        name = cursor.text("a tensor's name", _MAX_NAME)
        (n_dims,) = cursor.unpack(_U32)
        if name in tensors:
            raise GGUFError(f"tensor {name!r} occurs twice; {DAMAGED}")
        if n_dims > MAX_DIMS:
            raise GGUFError(f"tensor {name!r} claims {n_dims} dimensions; {DAMAGED}")
        *dims, type_number, offset = cursor.unpack(_TENSOR_TAILS[n_dims])
        tensors[name] = TensorEntry(name, tuple(dims), type_number, offset)
    return list(tensors.values())


def _alignment(fields: Mapping[str, Scalar | Array]) -> int:
    alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise GGUFError(f"general.alignment is {alignment!r}, not a power of two; {DAMAGED}")
    return alignment
