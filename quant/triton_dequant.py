"""Dequantising on GPUs by Triton kernels: one pass from blocks to the output.

triton is optional (torch brings it on Linux): without it `dequantize` takes the torch formulation,
whose numbers these equal, in a dozen passes. The bits of each type are drawn where its
torch formulation stands (legacy.py, k.py, iq.py). A program takes `B` blocks, a row each, and
`lane` runs over the bytes of a row; a byte is loaded once for all the weights that it holds, and
before the first of them is stored, since no load overtakes a store. Fusing products with sums is
off, so that a product is rounded before something is added to it.

A type is one function, whatever becomes of its weights. `at` is where each row's block starts, or
each lane's where several lie side by side: at an even address, and one that four divides in types
whose size it divides. got = take(got, there, seen, offset, w) is given the weights `offset` + lane
of each, float32: here to be stored, in triton_linear.py to be multiplied.
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
def _half(at):
    """An IEEE half, as float32."""
    return tl.load(at.to(tl.pointer_type(tl.float16), bitcast=True)).to(tl.float32)


@triton.jit
def _word(at):
    return tl.load(at.to(tl.pointer_type(tl.int32), bitcast=True))


@triton.jit
def _mantissa(bits):
    """2**23 + bits, as float32 holds it, for `_number` to make numbers of them."""
    return bits | 0x4B000000


@triton.jit
def _byte(at):
    return _mantissa(tl.load(at).to(tl.int32))


@triton.jit
def _bytes(at, step: tl.constexpr, count: tl.constexpr):
    got = (_byte(at),)
    for i in tl.static_range(1, count):
        got = got + (_byte(at + step * i),)  # noqa: RUF005
    return got


@triton.jit
def _number(bits, mask: tl.constexpr, shift: tl.constexpr = 0, less: tl.constexpr = 0, above=0):
    """(bits >> shift & mask) - less, as float32, of bits in a mantissa; `above` has more of them.

    The power of two is taken away: that is exact, and GPUs convert integers at a half to an eighth
    of the rate at which they add.
    """
    whole = (bits & (mask << shift | 0x4B000000) | above).to(tl.float32, bitcast=True)
    return tl.fma(whole, 2.0**-shift, -(2.0 ** (23 - shift)) - less)


@triton.jit
def _signed(bits):
    """A byte that is an int8."""
    return _number(bits ^ 128, 255, less=128)


@triton.jit
def q8_0(at, lane, levels, take: tl.constexpr, there, seen, got):
    return take(got, there, seen, 0, _signed(_byte(at + 2 + lane)) * _half(at))


@triton.jit
def q4_0(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, q = _half(at), _byte(at + 2 + lane)
    got = take(got, there, seen, 0, _number(q, 15, 0, 8) * d)
    return take(got, there, seen, 16, _number(q, 15, 4, 8) * d)


@triton.jit
def q4_1(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, m, q = _half(at), _half(at + 2), _byte(at + 4 + lane)
    got = take(got, there, seen, 0, _number(q, 15) * d + m)
    return take(got, there, seen, 16, _number(q, 15, 4) * d + m)


@triton.jit
def _fifth(at, lane):
    """The fifth bits of the weights `lane` and `lane` + 16, from `at`, as bits 4 and 8."""
    low, high = _byte(at + lane // 8), _byte(at + 2 + lane // 8)
    return low << 4 >> lane % 8 & 16, high << 8 >> lane % 8 & 256


@triton.jit
def q5_0(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, q = _half(at), _byte(at + 6 + lane)
    low, high = _fifth(at + 2, lane)
    got = take(got, there, seen, 0, _number(q, 15, 0, 16, low) * d)
    return take(got, there, seen, 16, _number(q, 15, 4, 16, high) * d)


@triton.jit
def q5_1(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, m, q = _half(at), _half(at + 2), _byte(at + 8 + lane)
    low, high = _fifth(at + 4, lane)
    got = take(got, there, seen, 0, _number(q, 15, above=low) * d + m)
    return take(got, there, seen, 16, _number(q, 15, 4, above=high) * d + m)


@triton.jit
def q2_k(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, m = _half(at + 80), _half(at + 82)
    scales, q = _bytes(at + lane // 16, 2, 8), _bytes(at + 16 + lane, 32, 2)
    for group in tl.static_range(2):
        for k in tl.static_range(4):
            scale = scales[4 * group + k]
            dl, ml = _number(scale, 15) * d, _number(scale, 15, 4) * m
            w = _number(q[group], 3, 2 * k) * dl - ml
            got = take(got, there, seen, 128 * group + 32 * k, w)
    return got


@triton.jit
def q3_k(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, h, q = _half(at + 108), _byte(at + lane), _bytes(at + 32 + lane, 32, 2)
    low, high = _bytes(at + 96 + lane // 16, 2, 4), _bytes(at + 104 + lane // 16, 2, 2)
    for group in tl.static_range(2):
        for k in tl.static_range(4):
            above = high[k % 2] << 4 - k // 2 * 2 & 48 << 4 * group
            dl = _number(low[k], 15, 4 * group, 32, above) * d
            above = h << 2 + 2 * k >> 4 * group + k & 4 << 2 * k
            w = _number(q[group], 3, 2 * k, 4, above) * dl
            got = take(got, there, seen, 128 * group + 32 * k, w)
    return got


@triton.jit
def _scales_mins(at):
    """The eight scales of Q4_K and Q5_K, and minima, from their bytes: each a byte of two words."""
    a, b, c = _word(at), _word(at + 4), _word(at + 8)
    sc = (a & 0x3F3F3F3F, c & 0x0F0F0F0F | a >> 2 & 0x30303030)
    m = (b & 0x3F3F3F3F, c >> 4 & 0x0F0F0F0F | b >> 2 & 0x30303030)
    return sc, m


@triton.jit
def _of_eight(words, j: tl.constexpr):
    return _number(_mantissa(words[j // 4] >> 8 * (j % 4)), 63)


@triton.jit
def q4_k(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, dmin, q = _half(at), _half(at + 2), _bytes(at + 16 + lane, 32, 4)
    sc, m = _scales_mins(at + 4)
    for pair in tl.static_range(4):
        for k in tl.static_range(2):
            dl, ml = _of_eight(sc, 2 * pair + k) * d, _of_eight(m, 2 * pair + k) * dmin
            w = _number(q[pair], 15, 4 * k) * dl - ml
            got = take(got, there, seen, 64 * pair + 32 * k, w)
    return got


@triton.jit
def q5_k(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, dmin, h, q = _half(at), _half(at + 2), _byte(at + 16 + lane), _bytes(at + 48 + lane, 32, 4)
    sc, m = _scales_mins(at + 4)
    for pair in tl.static_range(4):
        for k in tl.static_range(2):
            above = h << 4 + 4 * k >> 2 * pair + k & 16 << 4 * k
            dl, ml = _of_eight(sc, 2 * pair + k) * d, _of_eight(m, 2 * pair + k) * dmin
            w = _number(q[pair], 15, 4 * k, above=above) * dl - ml
            got = take(got, there, seen, 64 * pair + 32 * k, w)
    return got


@triton.jit
def q6_k(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, scales = _half(at + 208), _bytes(at + 192 + lane // 16, 2, 8)
    q, h = _bytes(at + lane, 32, 4), _bytes(at + 128 + lane, 32, 2)
    for group in tl.static_range(2):
        for side in tl.static_range(2):
            for k in tl.static_range(2):  # low nibbles, then high ones
                dl = _signed(scales[4 * group + 2 * k + side]) * d
                above = h[group] << 4 - 2 * side & 48 << 4 * k
                w = _number(q[2 * group + side], 15, 4 * k, 32, above) * dl
                got = take(got, there, seen, 128 * group + 64 * k + 32 * side, w)
    return got


@triton.jit
def iq4_nl(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, q = _half(at), _byte(at + 2 + lane)
    got = take(got, there, seen, 0, tl.load(levels + (q & 15)) * d)
    return take(got, there, seen, 16, tl.load(levels + (q >> 4 & 15)) * d)


@triton.jit
def iq4_xs(at, lane, levels, take: tl.constexpr, there, seen, got):
    d, high, low, q = _half(at), _word(at) >> 16, _word(at + 4), _bytes(at + 8 + lane, 16, 8)
    for j in tl.static_range(8):
        dl = _number(_mantissa(low >> 4 * j), 15, 0, 32, high << 4 >> 2 * j & 48) * d
        got = take(got, there, seen, 32 * j, tl.load(levels + (q[j] & 15)) * dl)
        got = take(got, there, seen, 32 * j + 16, tl.load(levels + (q[j] >> 4 & 15)) * dl)
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
    first = tl.program_id(0).to(tl.int64) * B
    b, lane = tl.arange(0, B)[:, None], tl.arange(0, lanes)[None, :]
    left = tl.minimum(n - first, B).to(tl.int32)
    at = data + first * width + tl.minimum(b, left - 1) * width  # beyond the last, that again
    unpack(at, lane, levels, _store, out + first * size + b * size + lane, b < left, 0)


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


def aligned(blocks: Tensor) -> Tensor:
    """Contiguous, and where `_half` and `_word` may read."""
    blocks = blocks.contiguous()
    return blocks.clone() if blocks.data_ptr() % 4 else blocks


def rows(size: int, lanes: int) -> int:
    """Blocks of a program: 4096 weights, and at least eight lanes, 16 bytes of halves to store, for
    each thread.
    """
    return max(4096 // size, 8 * 32 * _WARPS // lanes)


def beside(lanes: int, size: int) -> int:
    """How many blocks of a row fill the 32 lanes that products shall have; of large ones one."""
    return 32 // lanes if size == 32 else 1


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
            aligned(blocks),
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
