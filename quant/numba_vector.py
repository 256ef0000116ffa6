"""Sixteen numbers at a time in numba: a vector type, so that no speed hangs on what LLVM guesses.

`+ - * /`, comparisons, `& | << >>`, `abs` and the functions below act on each lane; a float32 or
int32 beside a vector stands for sixteen of it. Each operation is one LLVM instruction, rounded as C
rounds it, and only `fused` fuses two. LLVM makes of a vector what the processor has: one register
of 512 bits, two of 256 or four of 128. `numba_memory.py` takes vectors from arrays and puts them
back.
"""

import operator
from collections.abc import Callable, Sequence

import numba
from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.extending import lower_builtin, models, register_model, type_callable

LANES = 16
WORD, _BIT, BYTE = ir.IntType(32), ir.IntType(1), ir.IntType(8)
_FLOAT = ir.FloatType()


class Vector(types.Type):
    """Sixteen lanes of a numba type."""

    def __init__(self, dtype: types.Type):
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype} x {LANES})")


FLOATS, INTS, MASK = Vector(types.float32), Vector(types.int32), Vector(types.boolean)
LOWERED = {
    kind: ir.VectorType(element, LANES)
    for kind, element in ((FLOATS, _FLOAT), (INTS, WORD), (MASK, _BIT))
}
BYTES = ir.VectorType(BYTE, LANES)


class BFloat(ir.Type):
    """LLVM's bfloat16, which llvmlite does not know."""

    null, intrinsic_name = "0.0", "bf16"

    def _to_string(self):
        return "bfloat"


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, LOWERED[kind])


def shuffle(builder, a, b, lanes):
    mask = ir.Constant(ir.VectorType(WORD, len(lanes)), list(lanes))
    return builder.shuffle_vector(a, b, mask)


def spread(builder, value):
    """A vector with the scalar `value` in each lane; a vector as it is."""
    if isinstance(value.type, ir.VectorType):
        return value
    vector = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    vector = builder.insert_element(vector, value, ir.Constant(WORD, 0))
    return shuffle(builder, vector, vector, [0] * LANES)


def call(builder, name, result, *arguments):
    """Call LLVM's own function of that name."""
    kind, known = ir.FunctionType(result, [a.type for a in arguments]), builder.module.globals
    function = known[name] if name in known else ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def constant(kind, number):
    return ir.Constant(LOWERED[kind], [number] * LANES)


def define(function: Callable, result: types.Type, *arguments: types.Type) -> Callable:
    """Decorator: `build(builder, *values)` is what `function` of `arguments` compiles to.

    Where an argument is a vector, a scalar of its lanes' type will do, but not for all of them.
    """

    def fits(given, argument):
        given = types.unliteral(given)
        return given == argument or (
            isinstance(argument, Vector)
            and argument != MASK
            and (given == argument.dtype or (argument == INTS and isinstance(given, types.Integer)))
        )

    def typed(*given):
        if not any(isinstance(g, Vector) for g in given) or not all(map(fits, given, arguments)):
            return None
        kinds = [g if isinstance(g, Vector) else a.dtype for g, a in zip(given, arguments)]  # noqa: B905
        return signature(result, *kinds)

    # numba looks at how many arguments a typer takes
    typers = [lambda a: typed(a), lambda a, b: typed(a, b), lambda a, b, c: typed(a, b, c)]
    type_callable(function)(lambda context: typers[len(arguments) - 1])

    def decorate(build):
        def lower(context, builder, sig, args):
            return build(builder, *(spread(builder, value) for value in args))

        for place in range(2 ** len(arguments)):  # each subset of scalars
            kinds = [getattr(a, "dtype", a) if place >> i & 1 else a
                     for i, a in enumerate(arguments)]  # fmt: skip
            if any(isinstance(kind, Vector) for kind in kinds):
                lower_builtin(function, *kinds)(lower)
        return build

    return decorate


def _instructions() -> None:
    """The operators."""
    for symbol, name in (("add", "add"), ("iadd", "add"), ("sub", "sub"), ("mul", "mul")):
        for kind, prefix in ((FLOATS, "f"), (INTS, "")):
            operation = lambda builder, a, b, n=prefix + name: getattr(builder, n)(a, b)  # noqa: E731
            define(getattr(operator, symbol), kind, kind, kind)(operation)
    define(operator.truediv, FLOATS, FLOATS, FLOATS)(lambda builder, a, b: builder.fdiv(a, b))
    for symbol in ("lt", "gt", "le", "ge", "eq", "ne"):
        sign = {"lt": "<", "gt": ">", "le": "<=", "ge": ">=", "eq": "==", "ne": "!="}[symbol]
        compare = getattr(operator, symbol)
        unequal = symbol == "ne"  # true for NaN, unlike the others
        define(compare, MASK, FLOATS, FLOATS)(
            lambda builder, a, b, s=sign, u=unequal: (
                builder.fcmp_unordered(s, a, b) if u else builder.fcmp_ordered(s, a, b)
            )
        )
        define(compare, MASK, INTS, INTS)(
            lambda builder, a, b, s=sign: builder.icmp_signed(s, a, b)
        )
    for kind in (INTS, MASK):
        define(operator.and_, kind, kind, kind)(lambda builder, a, b: builder.and_(a, b))
        for symbol in (operator.or_, operator.ior):
            define(symbol, kind, kind, kind)(lambda builder, a, b: builder.or_(a, b))
    define(operator.invert, MASK, MASK)(lambda builder, a: builder.not_(a))
    define(operator.lshift, INTS, INTS, INTS)(lambda builder, a, b: builder.shl(a, b))
    define(operator.rshift, INTS, INTS, INTS)(lambda builder, a, b: builder.ashr(a, b))
    define(operator.neg, FLOATS, FLOATS)(lambda builder, a: builder.fneg(a))
    define(abs, FLOATS, FLOATS)(_magnitude)


def _magnitude(builder, a):
    bits = builder.and_(builder.bitcast(a, LOWERED[INTS]), constant(INTS, 0x7FFFFFFF))
    return builder.bitcast(bits, LOWERED[FLOATS])


_instructions()


def select(mask, a, b):
    """Lanes of a where the mask is set, of b elsewhere."""


def lesser(a, b):
    """The smaller, of int32."""


def greater(a, b):
    """The larger, of int32."""


def nearest(v):
    """int32: ggml's `nearest_int`, as `rounding.nearest_int`."""


def truncated(v):
    """int32: towards zero; `v` must be within int32's range."""


def floats(v):
    """int32 -> float32"""


def bits_of(v):
    """float32 -> int32: the same bits."""


def root(v):
    """The square root of float32, rounded once."""


def moved(v, n):
    """v · 2^n by adding to its exponent, for results that are neither subnormal nor infinite. n: of
    int32 the lowest nine bits, with sign; where these are zero, v as it is.
    """


def fused(a, b, c):
    """a · b + c, rounded once; slow where the processor cannot."""


for _kind in (FLOATS, INTS):
    define(select, _kind, MASK, _kind, _kind)(lambda builder, m, a, b: builder.select(m, a, b))


@define(lesser, INTS, INTS, INTS)
def _(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)


@define(greater, INTS, INTS, INTS)
def _(builder, a, b):
    return builder.select(builder.icmp_signed(">", a, b), a, b)


@define(nearest, INTS, FLOATS)
def _(builder, v):
    shifted = builder.bitcast(builder.fadd(v, constant(FLOATS, 12582912.0)), LOWERED[INTS])
    low = builder.and_(shifted, constant(INTS, 0x007FFFFF))
    return builder.sub(low, constant(INTS, 0x00400000))


@define(truncated, INTS, FLOATS)
def _(builder, v):
    return builder.fptosi(v, LOWERED[INTS])


@define(floats, FLOATS, INTS)
def _(builder, v):
    return builder.sitofp(v, LOWERED[FLOATS])


@define(bits_of, INTS, FLOATS)
def _(builder, v):
    return builder.bitcast(v, LOWERED[INTS])


@define(moved, FLOATS, FLOATS, INTS)
def _(builder, v, n):
    exponent = builder.shl(n, constant(INTS, 23))
    return builder.bitcast(
        builder.add(builder.bitcast(v, LOWERED[INTS]), exponent), LOWERED[FLOATS]
    )


@define(fused, FLOATS, FLOATS, FLOATS, FLOATS)
def _(builder, a, b, c):
    return call(builder, f"llvm.fma.v{LANES}f32", LOWERED[FLOATS], a, b, c)


@define(root, FLOATS, FLOATS)
def _(builder, v):
    return call(builder, f"llvm.sqrt.v{LANES}f32", LOWERED[FLOATS], v)


def splat(value):
    """Sixteen of a float32."""


def set_lanes(mask):
    """int32: bit j is lane j of the mask."""


def largest_lane(v):
    """The largest of int32 lanes."""


@type_callable(splat)
def _(context):
    return lambda value: signature(FLOATS, types.float32)


@lower_builtin(splat, types.float32)
def _(context, builder, sig, args):
    return spread(builder, args[0])


@define(set_lanes, types.int32, MASK)
def _(builder, mask):
    return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), WORD)


@define(largest_lane, types.int32, INTS)
def _(builder, v):
    return call(builder, f"llvm.vector.reduce.smax.v{LANES}i32", WORD, v)


def first_of(a, b):
    """The number of the first lane that is set in two masks, those of b following those of a."""


def smallest_lane(v):
    """The smallest of float32 lanes; of zeros, either."""


def biggest_lane(v):
    """The largest of float32 lanes; of zeros, either."""


@define(first_of, types.int32, MASK, MASK)
def _(builder, a, b):
    mask = builder.bitcast(shuffle(builder, a, b, range(2 * LANES)), WORD)
    return builder.cttz(mask, ir.Constant(_BIT, 0))


def _folded(sign):
    def build(builder, v):
        half = LANES // 2
        while half:
            other = shuffle(builder, v, v, [(lane + half) % LANES for lane in range(LANES)])
            v = builder.select(builder.fcmp_ordered(sign, v, other), v, other)
            half //= 2
        return builder.extract_element(v, ir.Constant(WORD, 0))

    return build


define(smallest_lane, types.float32, FLOATS)(_folded("<"))
define(biggest_lane, types.float32, FLOATS)(_folded(">"))


def stairs(edges: Sequence[float], values: Sequence[float]) -> Callable:
    """A function of a float32 vector: values[k], where k edges are not above the lane."""

    def step(v):
        """As `stairs` says."""

    @define(step, FLOATS, FLOATS)
    def _(builder, v):
        found = constant(FLOATS, values[0])
        for edge, value in zip(edges, values[1:], strict=True):
            below = builder.fcmp_ordered("<", v, constant(FLOATS, edge))
            found = builder.select(below, found, constant(FLOATS, value))
        return found

    return step


def helper(function: Callable) -> Callable:
    """Compiled into the kernels that call it, and not kept by itself."""
    return numba.njit(error_model="numpy")(function)
