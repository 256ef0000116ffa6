"""GGUF files put together by hand, so that each part of one can be wrong."""

import struct

import numpy as np
from gguf import GGUFValueType as V


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def u32(key: str, value: int) -> bytes:
    return field(key, V.UINT32, struct.pack("<I", value))


def string(key: str, value: str | bytes) -> bytes:
    return field(key, V.STRING, text(value))


def array(key: str, kind: int, count: int, payload: bytes) -> bytes:
    return field(key, V.ARRAY, struct.pack("<IQ", kind, count) + payload)


def strings(key: str, values: list[str]) -> bytes:
    return array(key, V.STRING, len(values), b"".join(map(text, values)))


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's header entry; `dims` innermost first, `kind` F32 unless told."""
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def gguf(fields=(), tensors=(), data=b"", version=3, counts=None, magic=b"GGUF", align=32) -> bytes:
    """The whole file. counts: (tensors, fields) to claim instead of the true ones."""
    n_tensors, n_fields = counts or (len(tensors), len(fields))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_fields)
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % align) + data


def small() -> bytes:
    """A good file with a field of each kind and tensors of several types."""
    rng = np.random.default_rng(0)
    fields = [
        string("general.architecture", "sd3"),
        u32("general.alignment", 32),
        field("a.flag", V.BOOL, b"\1"),
        field("a.number", V.FLOAT32, struct.pack("<f", 1.5)),
        field("a.long", V.INT64, struct.pack("<q", -(2**40))),
        strings("a.tokens", ["one", "zwei", "drei ü", ""]),
        array("a.scores", V.FLOAT32, 3, struct.pack("<3f", 0.5, -1, 2)),
        array("comfy.gguf.orig_shape.folded", V.INT32, 2, struct.pack("<2i", 8, 32)),
    ]
    tensors = [
        tensor("plain", (3, 2), 0, 0),  # F32: 24 bytes
        tensor("half", (5,), 1, 32),  # F16: 10 bytes
        tensor("folded", (256, 1), 14, 64),  # Q6_K: 210 bytes
        tensor("codes", (256, 2), 16, 288),  # IQ2_XXS: 132 bytes
        tensor("scalar", (), 0, 448),
        tensor("empty", (0, 4), 0, 480),
        tensor("wide", (1, 2, 1, 2, 2), 0, 480),  # 32 bytes
    ]
    return gguf(fields, tensors, rng.integers(0, 256, 512, dtype=np.uint8).tobytes())
