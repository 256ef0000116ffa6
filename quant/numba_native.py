"""Kernels that threads run without Python: C functions of an address, and what those are made of.

A call into Python costs a thread that is not Python's own some fifty microseconds and a wait for
the GIL, as long as a small product takes. So what the threads need is written down as numbers and
addresses, and they take its parts from a counter until none is left.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import lower_builtin, type_callable
from torch import Tensor

from .numba_jit import kept, named
from .numba_vector import helper
from .threads import natively

_LONG, _WORK = ir.IntType(64), (types.int64,) * 3


def address_of(function: Callable, *kinds: types.Type) -> int:
    """The address of a jitted function's code for arguments of these kinds, see `call`."""
    function.compile(kinds)
    compiled = function.overloads[kinds]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


def call(address, data, out):
    """Call what `address_of` found: a function of two arrays. -> whether it raised nothing."""


def call_with(address, data, out, table):
    """The same, of three."""


def _call_work(address, told, first, end):
    """The same, of three int64."""


def _take(counter):
    """What stands at that address, an int64; and add one to it, so that no other thread has it."""


def _pointer(address):
    """An address as a pointer."""


def _calls(context, builder, sig, args):
    kinds = sig.args[1:]
    code = context.call_conv.get_function_type(types.none, kinds).as_pointer()
    function = builder.inttoptr(args[0], code)
    status, _ = context.call_conv.call_function(builder, function, types.none, kinds, args[1:])
    return status.is_ok


@type_callable(call)
def _(context):
    return lambda address, data, out: signature(types.boolean, types.int64, data, out)


@type_callable(call_with)
def _(context):
    return lambda address, data, out, table: signature(types.boolean, types.int64, data, out, table)


lower_builtin(call, types.int64, types.Array, types.Array)(_calls)
lower_builtin(call_with, types.int64, types.Array, types.Array, types.Array)(_calls)
lower_builtin(_call_work, types.int64, *_WORK)(_calls)


@type_callable(_call_work)
def _(context):
    return lambda address, told, first, end: signature(types.boolean, types.int64, *_WORK)


@type_callable(_take)
def _(context):
    return lambda counter: signature(types.int64, types.int64)


@lower_builtin(_take, types.int64)
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
shorts_at, halves_at, bytes_at = (array_of(t) for t in (np.uint16, np.int16, np.uint8))


@cache
def _record(kind: type[NamedTuple]) -> np.dtype:
    numbers = {int: np.int64, float: np.float64}
    return np.dtype([(name, numbers[n]) for name, n in kind.__annotations__.items()])


def reader_of(kind: type[NamedTuple]) -> Callable:
    """A function for kernels: what `in_parts` was told, of that kind, from its address."""
    told_at = array_of(_record(kind))

    @helper
    def read(address):
        return told_at(address, 1)[0]

    return read


class _Parts(NamedTuple):
    work: int  # code for `_call_work`
    told: int
    n: int
    some: int
    next: int = 0
    done: int = 0


_read, _PARTS = reader_of(_Parts), _record(_Parts)
_NEXT, _DONE = (_PARTS.fields[name][1] for name in ("next", "done"))


@named
def _take_parts(parts):
    t = _read(parts)
    while True:
        first = _take(parts + _NEXT) * t.some
        if first >= t.n:
            return
        if _call_work(t.work, t.told, first, min(first + t.some, t.n)):
            _take(parts + _DONE)


@cache
def _taking() -> Callable:
    return kept(partial(cfunc, types.void(types.int64)), _take_parts)


@cache
def _code_of(work: Callable) -> int:
    return address_of(work, *_WORK)


def address(tensor: Tensor, dtype: torch.dtype) -> int:
    """Where a tensor's numbers lie. Raises: TypeError for another type; RuntimeError where they do
    not lie as they seem (subclasses, negative views, no memory) or a gradient is asked for.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"the kernel takes {dtype}, not {tensor.dtype}")
    return tensor.numpy().ctypes.data


def in_parts(work: Callable, told: NamedTuple, n: int, some: int, size: int) -> None:
    """work(address of `told`, first, end) for 0 … n, things of `size` numbers each, `some` of them
    at a time, on as many threads as they are worth.

    work: jitted; reads its arguments, of int and float, by `reader_of` their kind.
    Raises: MemoryError if there was none for a part; it can raise nothing else.
    """
    record = np.array([told], _record(type(told)))
    parts = _Parts(_code_of(work), record.ctypes.data, n, some)
    parts = np.array([parts], _PARTS)
    natively(_taking().address, parts.ctypes.data, n, size)
    if parts["done"] != -(-n // some):
        raise MemoryError("there was none for the parts of a computation: close other programs")
