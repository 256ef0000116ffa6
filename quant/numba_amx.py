"""Products of bfloat16 in Intel's AMX: eight registers of sixteen rows of sixty-four bytes.

Four of them hold sums, of 32 rows and 32 columns; two and two the factors, sixteen pairs deep.
Their shapes are set for a thread: others who use it (torch's own products do) may count on what
they set, so `hold` keeps that and `release` sets it again.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable

from .numba_memory import pointer
from .numba_vector import BYTE, call, helper

ROWS, COLUMNS = 32, 2  # of a tile of sums, the columns in vectors
_SIDE, _WIDTH = 16, 64  # rows of a register, and a row's bytes
_SHAPES = np.zeros(64, np.uint8)
_SHAPES[0] = 1  # palette
_SHAPES[16:32:2], _SHAPES[48:56] = _WIDTH, _SIDE
_A, _B = 4, 6  # the factors' first registers


def _read(shapes):
    """The registers' shapes into `shapes`, (64,) uint8."""


def _set(shapes):
    """Set them; what was in the registers is lost."""


for _function, _name in ((_read, "sttilecfg"), (_set, "ldtilecfg")):
    type_callable(_function)(lambda context: lambda shapes: signature(types.none, shapes))

    @lower_builtin(_function, types.Array)
    def _(context, builder, sig, args, name=_name):
        first = ir.Constant(ir.IntType(64), 0)
        _do(builder, name, pointer(context, builder, sig.args[0], args[0], first, BYTE))
        return context.get_dummy_value()


@helper
def hold():
    """Take this thread's registers -> what `release` wants."""
    kept = np.empty(64, np.uint8)
    _read(kept)
    _set(_SHAPES)
    return kept


@helper
def release(kept):
    """Give them back."""
    _set(kept)


def multiply(builder, columns: int, adds: bool, products, out) -> None:
    """What a tile of `numba_tile` compiles to. products: (a, b, depth), Operands and whole
    sixteens.
    """
    size = out.step.type

    def stride(step):
        return builder.mul(step, ir.Constant(size, 4))

    sums = {
        _register(r * COLUMNS + c): out.at(r * _SIDE, BYTE, ir.Constant(size, c * _SIDE))
        for r in range(ROWS // _SIDE)
        for c in range(columns)
    }
    for register, target in sums.items():
        if adds:
            _do(builder, "tileloadd64", register, target, stride(out.step))
        else:
            _do(builder, "tilezero", register)
    zero, deep, width = (ir.Constant(size, n) for n in (0, _SIDE, _WIDTH))
    for a, b, depth in products:
        with cgutils.for_range_slice(builder, zero, depth, deep, size) as (k, _):
            shift = builder.mul(k, deep)
            for c in range(columns):
                _do(builder, "tileloadd64", _register(_B + c), b.at(c, BYTE, shift), width)
            for r in range(ROWS // _SIDE):
                row, factor = a.at(r * _SIDE, BYTE, k), _register(_A + r)
                _do(builder, "tileloadd64", factor, row, stride(a.step))
                for c in range(columns):
                    total = _register(r * COLUMNS + c)
                    _do(builder, "tdpbf16ps", total, factor, _register(_B + c))
    for register, target in sums.items():
        _do(builder, "tilestored64", register, target, stride(out.step))


def _register(n):
    return ir.Constant(BYTE, n)


def _do(builder, name, *arguments):
    call(builder, f"llvm.x86.{name}", ir.VoidType(), *arguments)
