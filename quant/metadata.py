"""A GGUF file's key-value fields as a mapping; arrays stay in the file until they are asked for."""

from collections.abc import Iterator, Mapping

import numpy as np
from gguf import GGUFValueType

from .errors import GGUFError
from .header import DTYPES, MAX_STRING, Array, Buffer, Cursor, Scalar


class Metadata(Mapping[str, Scalar | list]):
    """Fields by key, in the file's order. An array is decoded to a list each time it is asked for.

    Raises: GGUFError, naming the file, for an array that is not UTF-8 or asked for after `release`.
    """

    def __init__(self, path: str, buffer: Buffer, fields: dict[str, Scalar | Array]):
        self._path = path
        self._buffer: Buffer | None = buffer
        self._fields = fields

    def __getitem__(self, key: str) -> Scalar | list:
        value = self._fields[key]
        return self._decode(key, value) if isinstance(value, Array) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, key: object) -> bool:  # Mapping's own would decode an array
        return key in self._fields

    def element_type(self, key: str) -> GGUFValueType | None:
        """The type of an array's elements; None where the field is no array."""
        value = self._fields[key]
        return GGUFValueType(value.kind) if isinstance(value, Array) else None

    def release(self) -> None:
        """Let go of the file; arrays cannot be decoded from now on."""
        self._buffer = None

    def _decode(self, key: str, array: Array) -> list:
        if self._buffer is None:
            raise GGUFError(f"{self._path}: field {key!r} was asked for after closing")
        if array.kind != GGUFValueType.STRING:
            dtype = DTYPES[array.kind]
            return np.frombuffer(self._buffer, dtype, array.count, array.offset).tolist()
        cursor = Cursor(self._buffer, array.offset)
        try:
            what = f"an entry of field {key!r}"
            return [cursor.text(what, MAX_STRING) for _ in range(array.count)]
        except GGUFError as error:
            raise GGUFError(f"{self._path}: {error}") from error
