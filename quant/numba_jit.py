"""What the CPU's quantising kernels are compiled with and made of: C's arithmetic in numba.

ggml sums a group of weights in order, so a group cannot be spread over a vector's lanes. Sixteen
groups can (`numba_vector.py`): each lane adds in ggml's order. fastmath stays off, so that no
product is fused with a sum. Numbers of 32 bits are cast as such, or numba would compute in 64.
"""

import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import binding
from numba.core.codegen import get_host_cpu_features

f4, i4, u1 = np.float32, np.int32, np.uint8
ZERO, ONE = f4(0.0), f4(1.0)
TOO_LARGE = f4(2147483648.0)  # for int32
_MAGIC, _HALF = f4(12582912.0), f4(0.5)

# What numba compiles for: what the processor has, or what it is told that one has.
_LISTED = numba.config.CPU_FEATURES
if _LISTED is None:
    _LISTED = "" if numba.config.CPU_NAME else get_host_cpu_features()
FEATURES = {name[1:]: name[0] == "+" for name in _LISTED.split(",") if name}
_LEAST_LLVM = (16, 0, 0)  # earlier ones give these instructions other types
if FEATURES.get("avx512bf16") and binding.llvm_version_info < _LEAST_LLVM:
    FEATURES["avx512bf16"] = False
    logging.getLogger(__name__).warning(
        "numba %s does not know this CPU's bfloat16 instructions: products by torch, which is "
        "slower. Install numba 0.62 or newer.",
        numba.__version__,
    )
# AMX's registers are the system's to give; it is asked for them (on Linux, by newer torch), for the
# process and for good, as torch asks for its own products.
AMX = all(FEATURES.get(name, False) for name in ("amx-tile", "amx-bf16")) and bool(
    getattr(torch.cpu, "_init_amx", bool)()
)

# numba's cache notices when a kernel's own file changes, but not the files of what it calls, so an
# update could leave old code in use; nor that the pack goes by another name (ComfyUI's and the
# shell's differ), under which the old code finds nothing. It names its files by the functions'. Of
# the processor it knows, but not which of its instructions our functions are made of.
_FILES = sorted(Path(__file__).parent.glob("numba_*.py"))
_SOURCES = [
    __name__.encode(),
    str((FEATURES, AMX)).encode(),
    *(path.read_bytes() for path in _FILES),
]
_DIGEST = hashlib.sha256(b"".join(_SOURCES)).hexdigest()[:12]


def named(function: Callable) -> Callable:
    """With a name of its own for as long as none of the kernels' files changes."""
    function.__qualname__ += "_" + _DIGEST
    return function


def jit(function: Callable) -> Callable:
    """Compile when first called, and keep the code until one of the kernels' files changes."""
    return kept(partial(numba.njit, nogil=True), named(function))


def kept(compiler: Callable, function: Callable) -> Callable:
    """What numba's `compiler` makes of a `named` function, kept if there is where to."""
    try:
        return compiler(cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder for the cache can be written to: compile in each process
        return compiler(error_model="numpy")(function)


@jit
def nearest_int(v):
    return i4((f4(v + _MAGIC).view(i4) & i4(0x007FFFFF)) - i4(0x00400000))


@jit
def half_bits(v):
    """The IEEE half nearest to a float32, ties to even."""
    bits = f4(v).view(i4)
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if size > 0x7F800000:
        return sign | 0x7E00
    if size >= 0x477FF000:
        return sign | 0x7C00
    if size < 0x38800000:  # subnormal: the sum's lowest bit is 2^-24
        return sign | (f4(abs(v) + _HALF).view(i4) - 0x3F000000)
    return sign | ((size + 0xFFF + ((size >> 13) & 1) - (112 << 23)) >> 13)


@jit
def half_value(bits):
    size, exponent = bits & 0x7FFF, (bits >> 10) & 0x1F
    if exponent == 0:
        value = f4(size) * f4(2.0**-24)
    elif exponent == 31:
        value = i4((size << 13) | 0x7F800000).view(f4)
    else:
        value = i4((size << 13) + (112 << 23)).view(f4)
    return -value if bits & 0x8000 else value


@jit
def store_half(out, place, v):
    """Write v as a half and return what was written."""
    bits = half_bits(v)
    out[place], out[place + 1] = u1(bits & 0xFF), u1(bits >> 8)
    return half_value(bits)
