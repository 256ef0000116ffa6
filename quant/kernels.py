"""Kernels that need a package which may be missing or broken: numba on CPUs, triton on GPUs."""

import importlib
import logging
from types import ModuleType

import torch

log = logging.getLogger(__name__)

Capability = tuple[int, int]

# The GPU itself failed, and so will whatever is done next. Older torch has no such class.
AcceleratorError = getattr(torch, "AcceleratorError", ())
_NO_MEMORY = ("out of memory", "alloc_failed")  # of a driver or a library, in lower case


def find_kernels(name: str, doing: str) -> ModuleType | None:
    """The module `name` of this package, called after what compiles it; None, and a line in the log
    on what is slower without it, where that is not installed, refuses this numpy or is broken.
    """
    try:
        return importlib.import_module(f".{name}", __package__)
    except Exception as error:  # noqa: BLE001 (a package that is there but broken raises anything)
        log.info("%s without %s, which is slower: %s", doing, name.partition("_")[0], error)
        return None


class Fallback:
    """Which kernels are still worth asking for, and what becomes of the errors of the others.

    A kind of work is a tuple that begins with its block type, its numbers' type and its device.
    """

    def __init__(self, doing: str):
        self.doing, self.failed, self.told = doing, set(), set()
        self.capable = {}  # GPU -> its compute capability: asking takes as long as a small kernel

    def allows(self, kind: tuple, least: Capability) -> bool:
        """Whether no kernel of the kind has failed, and the GPU, if it is one of NVIDIA's, has the
        compute capability `least`: Triton may end the process where it has no code for an older.
        """
        _, dtype, device, *_ = kind
        if kind in self.failed or device in self.failed:
            return False
        if device.type != "cuda" or torch.version.hip is not None:
            return True
        if device not in self.capable:
            self.capable[device] = torch.cuda.get_device_capability(device)
        capability = self.capable[device]
        if capability < least:
            why = "compute capability {}.{}, not {}.{}".format(*capability, *least)
            self._tell(f"in {dtype} on {device}", why)
        return capability >= least

    def after(self, error: Exception, kind: tuple, of_kind: tuple[type[Exception], ...]) -> None:
        """Ask for no kernel of the device any more, or, after one of the errors `of_kind`, for none
        of the kind; a driver or library that has no memory may have some the next time.

        Raises: `error` itself where it is torch's word that memory or the GPU failed.
        """
        qtype, dtype, device, *_ = kind
        if isinstance(error, (torch.OutOfMemoryError, AcceleratorError)):
            raise error
        if any(words in str(error).lower() for words in _NO_MEMORY):
            self._tell(f"on {device}, for now,", error)
        elif isinstance(error, of_kind):
            self.failed.add(kind)
            self._tell(f"of {qtype.name} in {dtype} on {device}", error)
        else:
            self.failed.add(device)
            self._tell(f"on {device}", error)

    def _tell(self, what: str, why: object) -> None:
        line = f"{self.doing} {what} by plain torch, which is slower: {why}"
        if line not in self.told:
            self.told.add(line)
            log.warning(line)
