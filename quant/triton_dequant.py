"""Dequantising on GPUs by Triton kernels: one pass from blocks to the output.

triton is optional (torch brings it on Linux): without it `dequantize` takes the torch formulation,
whose numbers these equal, in a dozen passes. The bits of each type are drawn where its
torch formulation stands (legacy.py, k.py, iq.py). A program takes `B` blocks, a row each, and
`lane` runs over the bytes of a row; a byte is loaded once for all the weights that it holds. Fusing
products with sums is off, so that a product is rounded before something is added to it.

A type is one function, whatever becomes of its weights. `at` is where each row's block starts, or
each lane's where several lie side by side, `live` which of them are there. got = take(got, there,
seen, offset, w) is given the weights `offset` + lane of each, float32: here to be stored, in
triton_linear.py to be multiplied.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from gguf.quants import IQ4_NL
from torch import Tensor
from triton.runtime import errors

log = logging.getLogger(__name__)

# Where a kernel can't be built (no compiler, no driver, a library that does not load, an unknown
# GPU) anything is raised; none of it is worth a picture that plain torch can draw.
FAILURES = (Exception,)
# Of these, what is said of one kernel only. Older Triton has no PTXASError.
OF_A_KIND = (errors.OutOfResources, getattr(errors, "PTXASError", errors.OutOfResources))
DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_WARPS = 2  # of a program


@triton.jit
def _byte(at, live):
    return tl.load(at, mask=live, other=0).to(tl.int32)


@triton.jit
def _signed(at, live):
    """An int8, as float32."""
    value = _byte(at, live)
    return (value - ((value & 128) << 1)).to(tl.float32)


@triton.jit
def _half(at, live):
    """An IEEE half that may lie at any address, as float32."""
    bits = _byte(at, live) | _byte(at + 1, live) << 8
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def q8_0(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    return take(got, there, seen, 0, _signed(at + 2 + lane, live) * _half(at, live))


@triton.jit
def q4_0(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d, q = _half(at, live), _byte(at + 2 + lane, live)
    got = take(got, there, seen, 0, ((q & 15) - 8).to(tl.float32) * d)
    return take(got, there, seen, 16, ((q >> 4) - 8).to(tl.float32) * d)


@triton.jit
def q4_1(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d, m, q = _half(at, live), _half(at + 2, live), _byte(at + 4 + lane, live)
    got = take(got, there, seen, 0, (q & 15).to(tl.float32) * d + m)
    return take(got, there, seen, 16, (q >> 4).to(tl.float32) * d + m)


@triton.jit
def _fifth(at, lane, live):
    """Bit 4 of the weights `lane` and `lane` + 16: one bit each of four bytes."""
    low, high = _byte(at + lane // 8, live), _byte(at + 2 + lane // 8, live)
    return (low >> lane % 8 & 1) << 4, (high >> lane % 8 & 1) << 4


@triton.jit
def q5_0(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d, q = _half(at, live), _byte(at + 6 + lane, live)
    low, high = _fifth(at + 2, lane, live)
    got = take(got, there, seen, 0, ((q & 15 | low) - 16).to(tl.float32) * d)
    return take(got, there, seen, 16, ((q >> 4 | high) - 16).to(tl.float32) * d)


@triton.jit
def q5_1(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d, m, q = _half(at, live), _half(at + 2, live), _byte(at + 8 + lane, live)
    low, high = _fifth(at + 4, lane, live)
    got = take(got, there, seen, 0, (q & 15 | low).to(tl.float32) * d + m)
    return take(got, there, seen, 16, (q >> 4 | high).to(tl.float32) * d + m)


@triton.jit
def q2_k(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d, m = _half(at + 80, live), _half(at + 82, live)
    for group in tl.static_range(2):
        q = _byte(at + 16 + 32 * group + lane, live)
        for k in tl.static_range(4):
            scale = _byte(at + 8 * group + 2 * k + lane // 16, live)
            dl, ml = (scale & 15).to(tl.float32) * d, (scale >> 4).to(tl.float32) * m
            w = (q >> 2 * k & 3).to(tl.float32) * dl - ml
            got = take(got, there, seen, 128 * group + 32 * k, w)
    return got


@triton.jit
def q3_k(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d, h = _half(at + 108, live), _byte(at + lane, live)
    for group in tl.static_range(2):
        q = _byte(at + 32 + 32 * group + lane, live)
        for k in tl.static_range(4):
            part = 8 * group + 2 * k + lane // 16
            low = _byte(at + 96 + part % 8, live) >> 4 * group & 15
            high = _byte(at + 104 + part % 4, live) >> 2 * (2 * group + k // 2) & 3
            dl = ((low | high << 4) - 32).to(tl.float32) * d
            w = ((q >> 2 * k & 3 | (h >> 4 * group + k & 1) << 2) - 4).to(tl.float32) * dl
            got = take(got, there, seen, 128 * group + 32 * k, w)
    return got


@triton.jit
def _scale_min(at, j: tl.constexpr, live):
    """Scale and minimum of sub-block j of Q4_K and Q5_K, float32; `at` is where their bytes are."""
    sc, m = _byte(at + j % 4, live), _byte(at + 4 + j % 4, live)
    if j < 4:
        sc, m = sc & 63, m & 63
    else:
        low = _byte(at + 4 + j, live)
        sc, m = low & 15 | (sc >> 6) << 4, low >> 4 | (m >> 6) << 4
    return sc.to(tl.float32), m.to(tl.float32)


@triton.jit
def q4_k(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d, dmin = _half(at, live), _half(at + 2, live)
    for pair in tl.static_range(4):
        q = _byte(at + 16 + 32 * pair + lane, live)
        for k in tl.static_range(2):
            sc, m = _scale_min(at + 4, 2 * pair + k, live)
            w = (q >> 4 * k & 15).to(tl.float32) * (sc * d) - m * dmin
            got = take(got, there, seen, 64 * pair + 32 * k, w)
    return got


@triton.jit
def q5_k(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d, dmin, h = _half(at, live), _half(at + 2, live), _byte(at + 16 + lane, live)
    for pair in tl.static_range(4):
        q = _byte(at + 48 + 32 * pair + lane, live)
        for k in tl.static_range(2):
            sc, m = _scale_min(at + 4, 2 * pair + k, live)
            q5 = q >> 4 * k & 15 | (h >> 2 * pair + k & 1) << 4
            w = q5.to(tl.float32) * (sc * d) - m * dmin
            got = take(got, there, seen, 64 * pair + 32 * k, w)
    return got


@triton.jit
def q6_k(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d = _half(at + 208, live)
    for group in tl.static_range(2):
        h = _byte(at + 128 + 32 * group + lane, live)
        for side in tl.static_range(2):
            q = _byte(at + 64 * group + 32 * side + lane, live)
            for k in tl.static_range(2):  # low nibbles, then high ones
                part = 2 * k + side
                dl = _signed(at + 192 + 8 * group + 2 * part + lane // 16, live) * d
                w = ((q >> 4 * k & 15 | (h >> 2 * part & 3) << 4) - 32).to(tl.float32) * dl
                got = take(got, there, seen, 128 * group + 32 * part, w)
    return got


@triton.jit
def iq4_nl(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d, q = _half(at, live), _byte(at + 2 + lane, live)
    got = take(got, there, seen, 0, tl.load(levels + (q & 15)) * d)
    return take(got, there, seen, 16, tl.load(levels + (q >> 4)) * d)


@triton.jit
def iq4_xs(at, lane, live, levels, take: tl.constexpr, there, seen, got):
    d = _half(at, live)
    for j in tl.static_range(8):
        low = _byte(at + 4 + j // 2, live) >> 4 * (j % 2) & 15
        high = _byte(at + 2 + j // 4, live) >> 2 * (j % 4) & 3
        dl = ((low | high << 4) - 32).to(tl.float32) * d
        q = _byte(at + 8 + 16 * j + lane, live)
        got = take(got, there, seen, 32 * j, tl.load(levels + (q & 15)) * dl)
        got = take(got, there, seen, 32 * j + 16, tl.load(levels + (q >> 4)) * dl)
    return got


_LANES = {
    16: (q4_0, q4_1, q5_0, q5_1, iq4_nl, iq4_xs),
    32: (q8_0, q2_k, q3_k, q4_k, q5_k, q6_k),
}
# type -> its function, lanes
FORMATS = {
    T[unpack.__name__.upper()]: (unpack, lanes)
    for lanes, functions in _LANES.items()
    for unpack in functions
}
COMPILED = frozenset(FORMATS)
_WITH_LEVELS = (T.IQ4_NL, T.IQ4_XS)


@triton.jit
def _store(got, to, live, offset: tl.constexpr, w):
    tl.store(to + offset, w, mask=live)
    return got


@triton.jit(do_not_specialize=["n"])
def _dequantize(
    data,
    out,
    n,
    levels,
    unpack: tl.constexpr,
    width: tl.constexpr,
    size: tl.constexpr,
    lanes: tl.constexpr,
    B: tl.constexpr,
):
    """n blocks of `width` bytes -> their `size` weights each."""
    b = (tl.program_id(0).to(tl.int64) * B + tl.arange(0, B))[:, None]
    lane, live = tl.arange(0, lanes)[None, :], b < n
    unpack(data + b * width, lane, live, levels, _store, out + b * size + lane, live, 0)


@cache
def levels(qtype: T, device: torch.device) -> Tensor | None:
    """The values of the codes of IQ4_NL and IQ4_XS; of other types none are looked up."""
    if qtype not in _WITH_LEVELS:
        return None
    return torch.tensor(IQ4_NL.kvalues, dtype=torch.float32, device=device)


@cache
def announce(doing: str, qtype: T, dtype: torch.dtype, device: torch.device) -> None:
    """Say, the first time, what the wait is for."""
    log.info("building Triton kernels for %s %s in %s on %s", doing, qtype.name, dtype, device)


def current(device: torch.device) -> AbstractContextManager:
    """Triton starts kernels on the current GPU: makes it this one."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def rows(size: int, lanes: int) -> int:
    """Blocks of a program: 4096 weights, and at least eight lanes, 16 bytes of halves to store, for
    each thread.
    """
    return max(4096 // size, 8 * 32 * _WARPS // lanes)


def unpack(blocks: Tensor, qtype: T, out: Tensor) -> None:
    """blocks (n, type_size) uint8 into out, of one of DTYPES; contiguous and on one GPU, both.

    Raises: one of FAILURES where no kernel can be built.
    """
    size, width = GGML_QUANT_SIZES[qtype]
    function, lanes = FORMATS[qtype]
    B = rows(size, lanes)
    announce("dequantising", qtype, out.dtype, out.device)
    with current(out.device):
        _dequantize[(triton.cdiv(len(blocks), B),)](
            blocks.contiguous(),
            out,
            len(blocks),
            levels(qtype, out.device),
            unpack=function,
            width=width,
            size=size,
            lanes=lanes,
            B=B,
            enable_fp_fusion=False,
            num_warps=_WARPS,
        )
