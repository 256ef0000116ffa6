"""Kernels that need a package which may not be there: numba on CPUs, triton on GPUs."""

import importlib
import logging
from types import ModuleType

log = logging.getLogger(__name__)


def find_kernels(name: str, doing: str) -> ModuleType | None:
    """The module `name` of this package, called after what compiles it; None, and a line in the log
    on what is slower without it, where that is not installed or refuses this numpy.
    """
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        log.info("%s without %s, which is slower: %s", doing, name.partition("_")[0], error)
        return None
