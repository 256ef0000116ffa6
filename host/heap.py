"""Memory that one step frees is there for the next.

torch asks the C library for each result's memory and gives it back a moment later. What then lies
free at the end of its heap, glibc returns to the system, which hands it out again page by page,
each filled with zeros first: up to 150 000 in a step at 512 x 512, a tenth of its time, or none, as
the heap happens to lie. So while a model samples on a CPU glibc keeps what is freed; after it a
gigabyte at the most, until the model is unloaded or dropped. Other C libraries are left alone, and
so is a process whose user told glibc what to keep.
"""

import ctypes
import mmap
import os
import re
import time
import weakref
from functools import cache
from pathlib import Path

import comfy.model_management as management
from comfy.patcher_extension import CallbacksMP

_MB = 2**20
_MOST = 1024 * _MB  # bytes that are kept
_RARELY = 300  # times as long as it takes to ask glibc what is free, it is not asked again
_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # parameters of mallopt(3)
# From how many bytes on: what lies free at the end is returned; so is a part of a thread's heap
# (there a gap, and more is taken at once); a result has memory of its own, and not of the heap,
# which large ones would leave full of gaps.
_KEEPING = {_TRIM: _MOST, _TOP_PAD: 64 * _MB, _MMAP: 128 * _MB}
# Where glibc's own rules end up once something large was freed; and so but for the heap's end.
_USUAL = {_TRIM: 64 * _MB, _TOP_PAD: 128 * 1024, _MMAP: 32 * _MB}
_RESTING = _USUAL | {_TRIM: _MOST}
_SIZES = Path("/proc/self/statm")
_TOLD = re.compile(r"malloc[._](trim_threshold|top_pad|mmap_threshold|mmap_max)", re.IGNORECASE)
_INFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd")
_INFO += ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Info(ctypes.Structure):
    """What mallinfo2(3) tells of all threads' heaps."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _INFO)


@cache
def _glibc() -> ctypes.CDLL | None:
    told = [*os.environ, os.environ.get("GLIBC_TUNABLES", "")]
    if not _SIZES.exists() or any(map(_TOLD.search, told)):
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _Info
    return library


def _set(options: dict[int, int]) -> None:
    for option, size in options.items():
        if not _glibc().mallopt(option, size):  # older ones take no more than that
            _glibc().mallopt(option, _USUAL[option])


def _unused() -> int:
    """Bytes of the process's memory that nobody took from glibc: what is free in its heaps, but not
    if it was returned, as glibc's own count of that has it; and, a constant, what is no heap's.
    """
    try:
        _, resident, shared, *_ = _SIZES.read_text().split()
    except (OSError, ValueError):  # as where no more files may be open: sampling goes on
        return 0
    info = _glibc().mallinfo2()
    anonymous = (int(resident) - int(shared)) * mmap.PAGESIZE
    return anonymous - info.uordblks - info.hblkhd


_before = 0  # of `_unused`, when keeping began
_again = 0.0  # when to ask for it again: glibc walks all that is free, which may be much


def _keep(_patcher) -> None:
    """Host's ON_PRE_RUN callback, before sampling."""
    global _before
    if not _before:
        _before = _unused()
    _set(_KEEPING)


def _rest(_patcher) -> None:
    """Host's ON_CLEANUP callback, after it."""
    global _again
    _set(_RESTING)
    if (begun := time.monotonic()) < _again:
        return
    unused = _unused()
    _again = begun + _RARELY * (time.monotonic() - begun)
    if unused - _before > _MOST:
        _glibc().malloc_trim(0)


def _return(_patcher=None, unpatch_all: bool = True) -> None:
    """Host's ON_DETACH callback; `unpatch_all` is False as a clone takes the weights over."""
    global _before
    if unpatch_all:
        _before = 0
        _set(_USUAL)
        _glibc().malloc_trim(0)


def keep_freed_memory(patcher) -> None:
    """For a freshly loaded MODEL."""
    if management.is_device_cpu(patcher.load_device) and _glibc() is not None:
        patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, __name__, _keep)
        patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, __name__, _rest)
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, __name__, _return)
        # the host forgets a model that nobody holds any more without unloading it
        weakref.finalize(patcher.model, _return).atexit = False
