"""Kernels that threads run without Python: C functions of an address, and what those are made of.

A call into Python costs a thread that is not Python's own some fifty microseconds and a wait for
the GIL, as long as a small product takes. So what the threads need is written down as numbers and
addresses, and they take its parts from a counter until none is left.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable

from .numba_jit import kept, named
from .numba_vector import helper

_LONG = ir.IntType(64)


def native(function: Callable) -> Callable[[], int]:
    """Decorator of function(address): gives the address of its compiled code, when first asked."""
    function = named(function)
    compiled = cache(lambda: kept(partial(cfunc, types.void(types.int64)), function))
    return lambda: compiled().address


def address_of(function: Callable, *kinds: types.Type) -> int:
    """The address of a jitted function's code for arguments of these kinds, see `call`."""
    function.compile(kinds)
    compiled = function.overloads[kinds]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


def call(address, data, out):
    """Call what `address_of` found: a function of two arrays that returns nothing."""


def call_with(address, data, out, table):
    """The same, of three."""


def take(counter):
    """What stands at that address, an int64; and add one to it, so that no other thread has it."""


def _pointer(address):
    """An address as a pointer."""


def _calls(context, builder, sig, args):
    kinds = sig.args[1:]
    code = context.call_conv.get_function_type(types.none, kinds).as_pointer()
    function = builder.inttoptr(args[0], code)
    context.call_conv.call_function(builder, function, types.none, kinds, args[1:])
    return context.get_dummy_value()


@type_callable(call)
def _(context):
    return lambda address, data, out: signature(types.none, types.int64, data, out)


@type_callable(call_with)
def _(context):
    return lambda address, data, out, table: signature(types.none, types.int64, data, out, table)


lower_builtin(call, types.int64, types.Array, types.Array)(_calls)
lower_builtin(call_with, types.int64, types.Array, types.Array, types.Array)(_calls)


@type_callable(take)
def _(context):
    return lambda counter: signature(types.int64, types.int64)


@lower_builtin(take, types.int64)
def _(context, builder, sig, args):
    place = builder.inttoptr(args[0], _LONG.as_pointer())
    return builder.atomic_rmw("add", place, ir.Constant(_LONG, 1), "monotonic")


@type_callable(_pointer)
def _(context):
    return lambda address: signature(types.voidptr, types.int64)


@lower_builtin(_pointer, types.int64)
def _(context, builder, sig, args):
    return builder.inttoptr(args[0], cgutils.voidptr_t)


def array_of(dtype) -> Callable:
    """A function for kernels: (n,) numbers from an address on."""

    @helper
    def array_at(address, n):
        return carray(_pointer(address), (n,), dtype)

    return array_at


floats_at, ints_at, longs_at = (array_of(t) for t in (np.float32, np.int32, np.int64))
shorts_at, bytes_at = (array_of(t) for t in (np.uint16, np.uint8))
