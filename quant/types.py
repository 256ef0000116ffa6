"""The table of tensor types: what each GGML type means and the function that unpacks it.

To add a type: write its function in a module of its family, add a row here. Sizes are gguf's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from . import iq, k, legacy, ternary
from . import iq1_quantize as iq1
from . import iq4_quantize as iq4
from . import k_quantize as kq
from . import microscaling as mx
from .codebook import quantize_blocks as quantize_by_codebook
from .errors import GGUFError

T = GGMLQuantizationType


@dataclass(frozen=True)
class QType:
    """A block format: `dequantize_blocks` maps (n, type_size) uint8 to (n, block_size) float32.

    `quantize_blocks` maps (n, block_size) float32, and the importance of each weight or None, back
    to bytes; it is None where the type can only be read.
    """

    qtype: GGMLQuantizationType
    dequantize_blocks: Callable[[Tensor], Tensor]
    about: str
    quantize_blocks: Callable[[Tensor, Tensor | None], Tensor] | None = None

    @property
    def block_size(self) -> int:
        """Weights in a block."""
        return GGML_QUANT_SIZES[self.qtype][0]

    @property
    def type_size(self) -> int:
        """Bytes in a block."""
        return GGML_QUANT_SIZES[self.qtype][1]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size


QTYPES: dict[GGMLQuantizationType, QType] = {
    row.qtype: row
    for row in (
        QType(T.Q8_0, legacy.dequantize_q8_0, "8-bit, scale for 32 weights", legacy.quantize_q8_0),
        QType(
            T.Q5_1, legacy.dequantize_q5_1, "5-bit, scale and minimum for 32", legacy.quantize_q5_1
        ),
        QType(T.Q5_0, legacy.dequantize_q5_0, "5-bit, scale for 32", legacy.quantize_q5_0),
        QType(
            T.Q4_1, legacy.dequantize_q4_1, "4-bit, scale and minimum for 32", legacy.quantize_q4_1
        ),
        QType(T.Q4_0, legacy.dequantize_q4_0, "4-bit, scale for 32", legacy.quantize_q4_0),
        QType(T.Q6_K, k.dequantize_q6_k, "6-bit, 8-bit scales for 16", kq.quantize_q6_k),
        QType(T.Q5_K, k.dequantize_q5_k, "5-bit, 6-bit scales and minima for 32", kq.quantize_q5_k),
        QType(T.Q4_K, k.dequantize_q4_k, "4-bit, 6-bit scales and minima for 32", kq.quantize_q4_k),
        QType(T.Q3_K, k.dequantize_q3_k, "3-bit, 6-bit scales for 16", kq.quantize_q3_k),
        QType(T.Q2_K, k.dequantize_q2_k, "2-bit, 4-bit scales and minima for 16", kq.quantize_q2_k),
        QType(
            T.IQ4_NL, iq.dequantize_iq4_nl, "4-bit uneven levels, scale for 32", iq4.quantize_iq4_nl
        ),
        QType(
            T.IQ4_XS,
            iq.dequantize_iq4_xs,
            "4-bit uneven levels, 6-bit scales for 32",
            iq4.quantize_iq4_xs,
        ),
        QType(
            T.IQ3_S,
            iq.dequantize_iq3_s,
            "codebook of 512 vectors of 4",
            partial(quantize_by_codebook, qtype=T.IQ3_S),
        ),
        QType(
            T.IQ3_XXS,
            iq.dequantize_iq3_xxs,
            "codebook of 256 vectors of 4",
            partial(quantize_by_codebook, qtype=T.IQ3_XXS),
        ),
        QType(
            T.IQ2_S,
            iq.dequantize_iq2_s,
            "codebook of 1024 vectors of 8",
            partial(quantize_by_codebook, qtype=T.IQ2_S),
        ),
        QType(
            T.IQ2_XS,
            iq.dequantize_iq2_xs,
            "codebook of 512 vectors of 8",
            partial(quantize_by_codebook, qtype=T.IQ2_XS),
        ),
        QType(
            T.IQ2_XXS,
            iq.dequantize_iq2_xxs,
            "codebook of 256 vectors of 8",
            partial(quantize_by_codebook, qtype=T.IQ2_XXS),
        ),
        QType(
            T.IQ1_M,
            iq.dequantize_iq1_m,
            "codebook of 2048 ternary vectors of 8, scales for 16",
            iq1.quantize_iq1_m,
        ),
        QType(
            T.IQ1_S,
            iq.dequantize_iq1_s,
            "codebook of 2048 ternary vectors of 8, scales for 32",
            iq1.quantize_iq1_s,
        ),
        QType(T.TQ2_0, ternary.dequantize_tq2_0, "ternary, two bits each", ternary.quantize_tq2_0),
        QType(T.TQ1_0, ternary.dequantize_tq1_0, "ternary, five in a byte", ternary.quantize_tq1_0),
        QType(
            T.MXFP4,
            mx.dequantize_mxfp4,
            "E2M1 floats, power-of-two scale for 32",
            mx.quantize_mxfp4,
        ),
        QType(T.NVFP4, mx.dequantize_nvfp4, "E2M1 floats, E4M3 scales for 16", mx.quantize_nvfp4),
    )
}

PLAIN_TYPES: dict[GGMLQuantizationType, torch.dtype] = {
    T.F32: torch.float32,
    T.F16: torch.float16,
    T.BF16: torch.bfloat16,
    T.F64: torch.float64,
    T.I8: torch.int8,
    T.I16: torch.int16,
    T.I32: torch.int32,
    T.I64: torch.int64,
}
PLAIN_QTYPES = {dtype: qtype for qtype, dtype in PLAIN_TYPES.items()}

_KNOWN: dict[int, GGMLQuantizationType] = {int(qtype): qtype for qtype in (*PLAIN_TYPES, *QTYPES)}

# Type numbers that ggml once used (ggml.h), for a better message than "unknown".
REMOVED_TYPES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


def find_type(number: int) -> GGMLQuantizationType:
    """The supported type with GGML's number `number`.

    Raises: GGUFError for any other, with the list of those known.
    """
    if (qtype := _KNOWN.get(number)) is not None:
        return qtype
    if number in REMOVED_TYPES:
        what = f"{REMOVED_TYPES[number]}, which ggml has removed: quantise again, say to Q4_0"
    elif number in GGMLQuantizationType._value2member_map_:
        what = f"{GGMLQuantizationType(number).name}, which is not meant for files"
    else:
        what = "unknown here: update FewStep, or get the file in another type"
    known = ", ".join(qtype.name for qtype in _KNOWN.values())
    raise GGUFError(f"GGML type {number} is {what} (known: {known})")


def types_markdown() -> str:
    """The table of supported types for the README."""
    lines = ["| Type | Bits per weight | Block | Format | Written |", "|---|---|---|---|---|"]
    for qtype, row in QTYPES.items():
        sizes = f"{row.bits_per_weight:.4g} | {row.block_size}"
        written = "yes" if row.quantize_blocks else "no"
        lines.append(f"| {qtype.name} | {sizes} | {row.about} | {written} |")
    plain = ", ".join(qtype.name for qtype in PLAIN_TYPES)
    lines.append(f"| {plain} | 8–64 | 1 | plain numbers, mapped as they are | floats |")
    return "\n".join(lines)
