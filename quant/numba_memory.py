"""Vectors of `numba_vector.py` from arrays and into them, and room for them.

Arrays must be contiguous, and indices count their elements.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable

from .numba_jit import ZERO
from .numba_vector import BYTES, FLOATS, INTS, LANES, LOWERED, helper, shuffle


def load(array, at):
    """Sixteen float32 from array[at] on."""


def load_bytes(array, at):
    """Sixteen uint8 from array[at] on, as int32."""


def store(array, at, v):
    """Put sixteen float32 into the array."""


def store_bytes(array, at, v):
    """Put the low bytes of sixteen int32 into an array of uint8."""


def pointer(context, builder, kind, array, at, vector):
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), ir.PointerType(vector))


def _memory(function, element, *values):
    """Type `function(array of element, index, *values)`, and lower it by what is decorated."""
    result = types.none if values else (FLOATS if element == types.float32 else INTS)

    def typed(array, *given):
        if isinstance(array, types.Array) and array.dtype == element and given == values:
            return signature(result, array, types.intp, *values)
        return None

    reading, writing = lambda array, at: typed(array), lambda array, at, v: typed(array, v)
    type_callable(function)(lambda context: writing if values else reading)
    return lower_builtin(function, types.Array, types.intp, *values)


@_memory(load, types.float32)
def _(context, builder, sig, args):
    place = pointer(context, builder, sig.args[0], *args, LOWERED[FLOATS])
    return builder.load(place, align=4)


@_memory(load_bytes, types.uint8)
def _(context, builder, sig, args):
    place = pointer(context, builder, sig.args[0], *args, BYTES)
    return builder.zext(builder.load(place, align=1), LOWERED[INTS])


@_memory(store, types.float32, FLOATS)
def _(context, builder, sig, args):
    place = pointer(context, builder, sig.args[0], args[0], args[1], LOWERED[FLOATS])
    builder.store(args[2], place, align=4)
    return context.get_dummy_value()


@_memory(store_bytes, types.uint8, INTS)
def _(context, builder, sig, args):
    place = pointer(context, builder, sig.args[0], args[0], args[1], BYTES)
    builder.store(builder.trunc(args[2], BYTES), place, align=1)
    return context.get_dummy_value()


def transpose(array, at, stride, out, to):
    """out[to :] = 16 × 16 float32, of which row j begins at array[at + j·stride], as columns."""


@type_callable(transpose)
def _(context):
    return lambda array, at, stride, out, to: signature(
        types.none, array, types.intp, types.intp, out, types.intp
    )


@lower_builtin(transpose, types.Array, types.intp, types.intp, types.Array, types.intp)
def _(context, builder, sig, args):
    array, at, stride, out, to = args
    vector, rows = LOWERED[FLOATS], []
    for _ in range(LANES):
        rows.append(
            builder.load(pointer(context, builder, sig.args[0], array, at, vector), align=4)
        )
        at = builder.add(at, stride)
    distance = LANES // 2
    while distance:  # swap the off-diagonal quarters of ever smaller squares
        lanes = range(LANES)
        low = [j if not j & distance else LANES + j - distance for j in lanes]
        high = [j + distance if not j & distance else LANES + j for j in lanes]
        for j in (j for j in lanes if not j & distance):
            a, b = rows[j], rows[j + distance]
            rows[j], rows[j + distance] = (shuffle(builder, a, b, m) for m in (low, high))
        distance //= 2
    for row in rows:
        builder.store(row, pointer(context, builder, sig.args[3], out, to, vector), align=4)
        to = builder.add(to, ir.Constant(to.type, LANES))
    return context.get_dummy_value()


@helper
def sum_of_lanes(v, lanes):
    """In their order; `lanes` is room for them."""
    store(lanes, 0, v)
    total = ZERO
    for lane in lanes:
        total += lane
    return total


@helper
def aligned(n):
    """(n,) float32 of any value that begin with a line of the cache, as torch's memory does: where
    they do not, every vector of 64 bytes lies in two lines, and its loading takes twice as long.
    """
    words = np.empty(n + LANES, np.float32)
    first = (-words.ctypes.data & 63) >> 2
    return words[first : first + n]
