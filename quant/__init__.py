"""GGUF files and their block formats, in torch, without ComfyUI."""

from .dequant import dequantize, dequantize_rows
from .errors import GGUFError
from .reader import GGUFFile, TensorInfo
from .types import PLAIN_TYPES, QTYPES, QType, types_markdown
from .writer import write_gguf

__all__ = [
    "PLAIN_TYPES",
    "QTYPES",
    "GGUFError",
    "GGUFFile",
    "QType",
    "TensorInfo",
    "dequantize",
    "dequantize_rows",
    "types_markdown",
    "write_gguf",
]
