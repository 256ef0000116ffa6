"""GGUF files and their block formats, in torch, without ComfyUI."""

from .dequant import dequantize, dequantize_rows
from .errors import GGUFError
from .types import PLAIN_TYPES, QTYPES, QType, types_markdown

__all__ = [
    "PLAIN_TYPES",
    "QTYPES",
    "GGUFError",
    "QType",
    "dequantize",
    "dequantize_rows",
    "types_markdown",
]
