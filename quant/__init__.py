"""GGUF files and their block formats, in torch, without ComfyUI."""

from . import needed  # noqa: F401 (ends `python -m quant` where packages are missing)
from .attention import attend
from .convolution import Convolution, convolves
from .dequant import (
    dequantize,
    dequantize_rows,
    low_rank_factors,
    multiplies_many,
    multiply_few,
    multiply_many,
)
from .errors import GGUFError
from .fused import multiply_fused, prefers_fused
from .merged import dequantize_merged, merges_unpacking
from .pointwise import gelu, rms_norm
from .quantize import quantize, writable_types
from .reader import GGUFFile, TensorInfo
from .types import PLAIN_QTYPES, PLAIN_TYPES, QTYPES, QType, types_markdown
from .writer import write_gguf

__all__ = [
    "PLAIN_QTYPES",
    "PLAIN_TYPES",
    "QTYPES",
    "Convolution",
    "GGUFError",
    "GGUFFile",
    "QType",
    "TensorInfo",
    "attend",
    "convolves",
    "dequantize",
    "dequantize_merged",
    "dequantize_rows",
    "gelu",
    "low_rank_factors",
    "merges_unpacking",
    "multiplies_many",
    "multiply_few",
    "multiply_fused",
    "multiply_many",
    "prefers_fused",
    "quantize",
    "rms_norm",
    "types_markdown",
    "writable_types",
    "write_gguf",
]
