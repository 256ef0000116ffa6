"""Work shared out to plain threads, as many as torch would take: the kernels let go of the GIL.

Torch's own threads wait for one another by spinning, on the very cores that others' work wants; so
what runs here keeps its tensors below the size at which torch would wake them (see `PIECE`).
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

PIECE = 2**15  # numbers up to which torch's element-wise operations stay on the thread that calls
_LEAST = 2**14  # numbers that are worth a thread
_MOST = 32  # threads of `in_order`: each holds some 20 MB
_ours = threading.local()
Item, Result = TypeVar("Item"), TypeVar("Result")


def in_threads(work: Callable[[int, int], Result], n: int, size: int) -> list[Result]:
    """What work(first, end) returns for shares of 0 … n, things of `size` numbers each.

    Within one of these threads all of it is a single share.
    """
    threads = max(1, min(torch.get_num_threads(), n * size // _LEAST))
    if threads == 1 or getattr(_ours, "working", False):
        return [work(0, n)]
    bounds = [n * i // threads for i in range(threads + 1)]
    return list(_pool(torch.get_num_threads()).map(work, bounds, bounds[1:]))


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
        wait(begun)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "fewstep", lambda: setattr(_ours, "working", True))


if sys.platform != "win32":  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
