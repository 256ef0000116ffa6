"""Work on several threads, without two pools of them on the same cores.

A kernel's parts run on torch's own threads. Between two operations these spin for some
milliseconds, so that the next one finds them awake; a thread of ours would have to share a core
with one of them, and dequantising between two products would run at half its speed. So parts run
where torch's would, by the entry point that compilers call for `#pragma omp parallel`, in the
OpenMP library that torch has loaded (GNU's has it, and LLVM's and Intel's for its sake). Where
torch shows none, as on Windows, a pool of threads does.

A long row of items (`in_order`) takes that pool from the start: what each of them calls stays on
its thread, if it lets torch have no more than `PIECE` numbers at a time.
"""

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

PIECE = 2**15  # numbers up to which torch's element-wise operations stay on the thread that calls
_LEAST = 2**14  # numbers that are worth a thread
_MOST = 32  # threads of `in_order`: each holds some 20 MB
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_ours = threading.local()
Item, Result = TypeVar("Item"), TypeVar("Result")


def in_threads(work: Callable[[int, int], Result], n: int, size: int) -> list[Result]:
    """What work(first, end) returns for the parts of 0 … n, things of `size` numbers each.

    As many parts as torch has threads, none of them empty; one within `in_order`. What `work` calls
    should let go of the GIL. Raises: what the first part that failed raised.
    """
    threads = _worth(n, size)
    if threads == 1:
        return [work(0, n)]
    bounds = [n * i // threads for i in range(threads + 1)]
    parts, results, errors = iter(list(enumerate(pairwise(bounds)))), [None] * threads, []
    ended = {}  # the threads whose last word was no error

    def take_parts(_=None) -> None:
        try:
            here = threading.get_ident()
            for i, (first, end) in parts:  # OpenMP may give fewer threads than it was asked for
                results[i] = work(first, end)
        except BaseException as error:  # noqa: BLE001  C would lose it
            errors.append(error)
        else:
            ended[here] = True

    _run(_BODY(take_parts), None, threads)
    if errors:
        raise errors[0]
    if _openmp() is not None and threading.get_ident() not in ended:
        raise KeyboardInterrupt  # before the `try`, where Python only printed it
    return results


def natively(body: int, told: int, n: int, size: int) -> None:
    """Run the C function at address `body` with the address `told` on as many threads as
    `in_threads` takes for n things of `size` numbers. It shares them out itself, without Python.
    """
    threads, function = _worth(n, size), _BODY(body)
    if threads == 1:
        function(told)
    else:
        _run(function, told, threads)


def _worth(n: int, size: int) -> int:
    """How many threads n things of `size` numbers are worth."""
    if getattr(_ours, "working", False):
        return 1
    return max(1, min(torch.get_num_threads(), n, n * size // _LEAST))


def _run(body: Callable, told: int | None, threads: int) -> None:
    """body(told), a _BODY, on so many threads at once; OpenMP may give fewer."""
    if (parallel := _openmp()) is not None:
        parallel(body, told, threads, 0)
    else:
        pool, begun = _pool(torch.get_num_threads()), []
        try:
            for _ in range(threads):
                begun.append(pool.submit(body, told))
        finally:
            _end(begun)


def _end(begun: list[Future]) -> None:
    """Wait for them; an interrupt, however often, waits as well: it frees what they read."""
    interrupt = None
    while not all(future.done() for future in begun):
        try:
            wait(begun)
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """work(item) of each item, several at a time, the results in the items' order.

    An error is raised in its turn; it, and the end of the iteration, end all that was begun.
    """
    threads = min(torch.get_num_threads(), _MOST)
    if threads == 1:
        yield from map(work, items)
        return
    begun = deque()
    try:
        for item in items:
            begun.append(_pool(threads).submit(work, item))
            if len(begun) > 2 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
        _end(begun)


@cache
def _openmp() -> Callable | None:
    """`void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags)`"""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    function.argtypes = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "fewstep", lambda: setattr(_ours, "working", True))


if sys.platform != "win32":  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
