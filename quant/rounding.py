"""C's roundings and sums in torch: what makes our bytes equal ggml's.

Each function takes float32 of any shape and device. ggml is compiled without fused multiply-add, so
a product and a sum are two roundings, as two torch operations are.
"""

import torch
from torch import Tensor

_INT_TO_MANTISSA = 12582912.0  # 1.5 · 2^23: the sum's lowest bits are the integer


def nearest_int(x: Tensor) -> Tensor:
    """int32: half to even for |x| < 2^22, and what ggml's bit trick yields for all other floats."""
    if not x.is_cpu:  # NaN, which yields 0, has other bits on a GPU
        x = torch.where(x.isnan(), 0.0, x)
    return ((x + _INT_TO_MANTISSA).view(torch.int32) & 0x007FFFFF) - 0x00400000


def truncate(x: Tensor) -> Tensor:
    """int32: towards zero. Out of range and NaN give 0, the low byte of x86's 0x80000000."""
    return torch.where(x.abs() < 2.0**31, x, 0.0).to(torch.int32)


def round_half_away(x: Tensor) -> Tensor:
    """int32: C's `roundf`. `x ± 0.5` would be wrong for the float below a half."""
    whole = x.trunc()
    return truncate(torch.where((x - whole).abs() >= 0.5, whole + x.sign(), whole))


def half_bytes(x: Tensor) -> Tensor:
    """(n,) float32 -> (n, 2) uint8: the IEEE half, ties to even, too large to infinity."""
    return x.to(torch.float16).view(-1, 1).view(torch.uint8)


def reciprocal(x: Tensor) -> Tensor:
    """1/x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1.0 / x)


def divide(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once. torch on a GPU would multiply by the rounded 1 / number."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def quotient(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once. torch's own operator would multiply by the rounded 1 / x."""
    return torch.full_like(x, number) / x


def square_root(x: Tensor) -> Tensor:
    """Rounded correctly, as C's `sqrtf`; torch's own for float32 on a CPU can be an ulp off."""
    return x.double().sqrt().float()


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over dim 0, from index 0 on, rounded at each step as C's loop does."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def smallest(x: Tensor) -> Tensor:
    """Over dim 0: the smallest value, of zeros of either sign the first, unlike `amin`."""
    low = x[0]
    for value in x:
        low = torch.where(value < low, value, low)
    return low


def amax_above_zero(x: Tensor) -> Tensor:
    """Over dim 0: the largest value, 0 if none is above zero; NaN is passed over."""
    largest = torch.zeros_like(x[0])
    for value in x:
        largest = torch.where(value > largest, value, largest)
    return largest


def signed_amax(x: Tensor) -> Tensor:
    """Over dim 0: the value with the largest magnitude, the first such; 0 if there is none."""
    amax, largest = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for value in x:
        larger = value.abs() > amax
        amax = torch.where(larger, value.abs(), amax)
        largest = torch.where(larger, value, largest)
    return largest
