"""A product in int8 on CPUs, as `comfy_kitchen`'s TensorWiseINT8Layout computes it.

Activations are rotated and rounded on their way in, sums are scaled on their way out, in one pass
each, where torch's own operations take half a dozen. The rotation is the regular Hadamard matrix of
256 = 4⁴ (Kronecker powers of h4, over 16), which spreads outliers: in four steps of butterflies,
two of which cross the lanes of vectors and so work on the transpose.
Source: comfy_kitchen backends/eager/quantization.py (`int8_linear`), convrot_w4a4.py
(`_build_hadamard`).
"""

import numpy as np
import torch
from torch import Tensor

from .numba_jit import ONE, f4, i4, jit
from .numba_memory import load, store, store_bytes, transpose
from .numba_vector import LANES, bits_of, greater, helper, largest_lane, nearest, splat
from .threads import in_threads

GROUP = 256  # columns that are rotated together
_LEAST = f4(1e-30)  # a scale of zeros


@helper
def _butterflies(t, step):
    """h4 on each four vectors of t (256,) that lie `step` vectors apart."""
    for i in range(4):
        at = LANES * (i * (4 if step == 1 else 1))
        a, b = load(t, at), load(t, at + LANES * step)
        c, d = load(t, at + 2 * LANES * step), load(t, at + 3 * LANES * step)
        half = (a + b + c + d) * f4(0.5)
        for k, v in enumerate((d, c, b, a)):
            store(t, at + k * LANES * step, half - v)  # twice that is h4's row


@helper
def _rotate(x, y, t):
    """y = x (columns,) rotated; t (256,) is room to work in."""
    for start in range(0, len(x), GROUP):
        transpose(x, start, LANES, t, 0)
        _butterflies(t, 1)
        _butterflies(t, 4)
        transpose(t, 0, LANES, y, start)
        group = y[start : start + GROUP]
        _butterflies(group, 1)
        _butterflies(group, 4)


@jit
def _round_rows(x, rotated, q, scales):
    """q (rows, columns) int8 as uint8 and its scales (rows,), of x or of x rotated."""
    y, t = np.empty(x.shape[1], np.float32), np.empty(GROUP, np.float32)
    whole = x.shape[1] // LANES * LANES
    for r in range(len(x)):
        row, out = x[r], q[r]
        if rotated:
            _rotate(row, y, t)
            row = y
        largest = bits_of(splat(f4(0.0)))
        for i in range(0, whole, LANES):
            largest = greater(largest, bits_of(abs(load(row, i))))
        most = i4(largest_lane(largest)).view(np.float32)
        for v in row[whole:]:
            most = max(most, abs(v))
        scales[r] = max(most / f4(127.0), _LEAST)
        inverse = ONE / scales[r]
        for i in range(0, whole, LANES):
            store_bytes(out, i, nearest(load(row, i) * inverse))
        for i in range(whole, len(row)):
            out[i] = np.uint8(i4(np.rint(row[i] * inverse)) & 0xFF)


@jit
def _scale(sums, rows, columns, bias, out):
    """out = sums · rows · columns + bias, all rows and columns."""
    for r in range(len(sums)):
        source, target, scale = sums[r], out[r], rows[r]
        for i in range(len(source)):
            target[i] = f4(source[i]) * (scale * columns[i]) + bias[i]


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotated: bool) -> Tensor:
    """(m, rows) float32: x (m, columns) float32, `rotated` here or not, rounded to int8 with a
    scale for each row, times `weight` (rows, columns) int8 whose rows have `scale` (rows,).

    Columns are whole groups of GROUP where they are to be rotated. All on the CPU.
    """
    x = x.contiguous()
    q, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x))
    a, b, c = x.numpy(), q.numpy(), scales.numpy()
    in_threads(lambda i, j: _round_rows(a[i:j], rotated, b[i:j], c[i:j]), len(x), x.shape[1])
    sums = torch._int_mm(q.view(torch.int8), weight.t()).numpy()
    out = torch.empty(sums.shape)
    bias = torch.zeros(len(weight)) if bias is None else bias
    columns, add, to = scale.numpy(), bias.numpy(), out.numpy()
    in_threads(lambda i, j: _scale(sums[i:j], c[i:j], columns, add, to[i:j]), len(x), len(weight))
    return out
