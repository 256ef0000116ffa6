"""The system's cache of files: a file out of it, as on the first picture of the day, or in it."""

import os
from pathlib import Path

CAN_FORGET = hasattr(os, "posix_fadvise")  # Linux; others have no call for one file


def forget(path: str | Path) -> None:
    """Have the next reading of the file come from the disk. Pages that a process has mapped stay,
    and so do files of a file system that lies in memory.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # only what is written can be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(path: str | Path) -> None:
    """Have the next reading of the file come from memory, if it fits there."""
    with open(path, "rb", buffering=0) as file:
        while file.read(2**24):
            continue
