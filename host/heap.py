"""Memory that one step frees is there for the next.

torch asks the C library for each result's memory and gives it back a moment later. What then lies
free at the end of its heap, glibc returns to the system, which hands it out again page by page,
each filled with zeros first: up to 150 000 in a step at 512 x 512, a tenth of its time, or none, as
the heap happens to lie. So from a model's first sampling on a CPU until it is unloaded glibc keeps
up to a gigabyte; then all that is free is returned at once. Other C libraries are left alone, and
so is a process whose user told glibc what to keep.
"""

import ctypes
import os
import sys
from functools import cache

import comfy.model_management as management
from comfy.patcher_extension import CallbacksMP

_MB = 2**20
_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # parameters of mallopt(3)
# From how many bytes on: what lies free at the end is returned; so is a part of a thread's heap
# (there a gap, and more is taken at once); a result has memory of its own, and not of the heap.
_KEEPING = {_TRIM: 1024 * _MB, _TOP_PAD: 64 * _MB, _MMAP: 1024 * _MB}
# Where glibc's own rules end up once something large was freed.
_USUAL = {_TRIM: 64 * _MB, _TOP_PAD: 128 * 1024, _MMAP: 32 * _MB}


@cache
def _glibc() -> ctypes.CDLL | None:
    told = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or told or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def _set(options: dict[int, int]) -> None:
    for option, size in options.items():
        if not _glibc().mallopt(option, size):  # older ones take no more than that
            _glibc().mallopt(option, _USUAL[option])


def _keep(_patcher) -> None:
    _set(_KEEPING)


def _return(_patcher, unpatch_all: bool) -> None:
    """`unpatch_all` is False as a clone takes the weights over."""
    if unpatch_all:
        _set(_USUAL)
        _glibc().malloc_trim(0)


def keep_freed_memory(patcher) -> None:
    """For a freshly loaded MODEL."""
    if management.is_device_cpu(patcher.load_device) and _glibc() is not None:
        patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, __name__, _keep)
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, __name__, _return)
