"""Convolutions of 3×3 in float32 by Winograd's minimal filtering, F(4×4, 3×3).

Four by four numbers of a channel come of a tile of six by six. Tile and filter are turned into 36
numbers each, by sums alone; these are multiplied, one matrix product over the channels for each of
the 36; and the products are turned into the result. That takes a quarter of a plain convolution's
products. Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv
1509.09308), section 4.1.

A thread turns a block of tiles at a time, and multiplies it with all filters while it is in cache.
"""

from torch import Tensor

from .numba_jit import ZERO, f4, jit
from .numba_memory import aligned, load, store
from .numba_tile import ROWS, make_tile
from .numba_vector import LANES, helper, splat
from .threads import in_threads

_OUT, _SIDE = 4, 6  # of what comes of a tile, and of a tile
PLANES = _SIDE * _SIDE
_BLOCK = 8 * ROWS  # tiles
_tile = make_tile(1)


@helper
def _turn_filter(v, at, step, out, to, out_step):
    """Three vectors of a filter's row or column, multiplied by G -> six."""
    a, b, c = load(v, at), load(v, at + step), load(v, at + 2 * step)
    outer, middle = (a + c) * f4(-1 / 6), b * f4(1 / 6)
    wide, tall = a * f4(1 / 24) + c * f4(1 / 6), b * f4(1 / 12)
    store(out, to, a * f4(1 / 4))
    store(out, to + out_step, outer - middle)
    store(out, to + 2 * out_step, outer + middle)
    store(out, to + 3 * out_step, wide + tall)
    store(out, to + 4 * out_step, wide - tall)
    store(out, to + 5 * out_step, c)


@helper
def _turn(v, at, step, out, to, out_step):
    """Six vectors of a tile's row or column, multiplied by Bᵀ -> six."""
    a, b, c = load(v, at), load(v, at + step), load(v, at + 2 * step)
    d, e, f = load(v, at + 3 * step), load(v, at + 4 * step), load(v, at + 5 * step)
    even, odd = e - f4(4.0) * c, d - f4(4.0) * b
    wide, tall = e - c, f4(2.0) * (d - b)
    store(out, to, f4(4.0) * a - f4(5.0) * c + e)
    store(out, to + out_step, even + odd)
    store(out, to + 2 * out_step, even - odd)
    store(out, to + 3 * out_step, wide + tall)
    store(out, to + 4 * out_step, wide - tall)
    store(out, to + 5 * out_step, f4(4.0) * b - f4(5.0) * d + f)


@helper
def _turn_back(v, at, step, out, to, out_step):
    """Six vectors of the products' row or column, multiplied by Aᵀ -> four."""
    a, b, c = load(v, at), load(v, at + step), load(v, at + 2 * step)
    d, e, f = load(v, at + 3 * step), load(v, at + 4 * step), load(v, at + 5 * step)
    near, far, left, right = b + c, d + e, b - c, d - e
    store(out, to, a + near + far)
    store(out, to + out_step, left + f4(2.0) * right)
    store(out, to + 2 * out_step, near + f4(4.0) * far)
    store(out, to + 3 * out_step, left + f4(8.0) * right + f)


@jit
def _turn_filters(weight, channels, outputs, first, end, panels):
    """weight (9, channels, outputs) -> panels (outputs / 16, 36, channels, 16), both flat, of the
    channels first … end.
    """
    half, step = aligned(3 * _SIDE * LANES), channels * outputs
    for channel in range(first, end):
        for k in range(0, outputs, LANES):
            for c in range(3):
                at = c * step + channel * outputs + k
                _turn_filter(weight, at, 3 * step, half, c * LANES, 3 * LANES)
            for r in range(_SIDE):
                to = (k * PLANES + r * _SIDE * LANES) * channels + channel * LANES
                _turn_filter(half, 3 * r * LANES, LANES, panels, to, channels * LANES)


@helper
def _place(n, height, width):
    """Picture, and first row and column of what comes of tile n of all pictures'."""
    across, down = -(-width // _OUT), -(-height // _OUT)
    return n // (across * down), n // across % down * _OUT, n % across * _OUT


@helper
def _turn_tile(x, n, height, width, channels, room, out, to, plane):
    """Tile n of x -> its 36 numbers of each channel: out[to] and each `plane` on. Beyond the
    picture's edges lie zeros. room: two tiles of vectors.
    """
    picture, row, column = _place(n, height, width)
    top, left, half = row - 1, column - 1, PLANES * LANES
    for i in range(0, channels, LANES):
        for r in range(_SIDE):
            for c in range(_SIDE):
                v = splat(ZERO)
                if 0 <= top + r < height and 0 <= left + c < width:
                    pixel = (picture * height + top + r) * width + left + c
                    v = load(x, pixel * channels + i)
                store(room, (r * _SIDE + c) * LANES, v)
        for c in range(_SIDE):
            _turn(room, c * LANES, _SIDE * LANES, room, half + c * LANES, _SIDE * LANES)
        for r in range(_SIDE):
            at, place = half + r * _SIDE * LANES, to + r * _SIDE * plane + i
            _turn(room, at, LANES, out, place, plane)


@helper
def _turn_sums(sums, at, plane, added, room, out, n, height, width, outputs, k):
    """Tile n's products of channels k … k + 16, from sums[at] and each `plane` on -> their place in
    out, `added` to each.
    """
    picture, row, column = _place(n, height, width)
    half = PLANES * LANES
    for r in range(_SIDE):
        _turn_back(sums, at + r * _SIDE * plane, plane, room, half + r * _OUT * LANES, LANES)
    for c in range(_OUT):
        _turn_back(room, half + c * LANES, _OUT * LANES, room, c * LANES, _OUT * LANES)
    for r in range(min(_OUT, height - row)):
        for c in range(min(_OUT, width - column)):
            pixel = (picture * height + row + r) * width + column + c
            store(out, pixel * outputs + k, load(room, (r * _OUT + c) * LANES) + added)


@jit
def _convolve(x, height, width, channels, panels, outputs, bias, out, first, end):
    """Tiles first … end of x (pictures, height, width, channels) -> out (…, outputs), both flat."""
    block = min(_BLOCK, -(-(end - first) // ROWS) * ROWS)
    inputs, plane = aligned(PLANES * block * channels), block * channels
    inputs[:] = ZERO
    sums, room = aligned(PLANES * block * LANES), aligned(2 * PLANES * LANES)
    for begin in range(first, end, block):
        count = min(block, end - begin)
        for n in range(count):
            at = n * channels
            _turn_tile(x, begin + n, height, width, channels, room, inputs, at, plane)
        for k in range(0, outputs, LANES):
            for number in range(PLANES):
                panel = (k * PLANES + number * LANES) * channels
                for n in range(0, count, ROWS):
                    at, to = number * plane + n * channels, (number * block + n) * LANES
                    _tile(inputs, at, channels, panels, panel, 0, channels, sums, to, LANES)
            added = load(bias, k)
            for n in range(count):
                at, step = n * LANES, block * LANES
                _turn_sums(sums, at, step, added, room, out, begin + n, height, width, outputs, k)


def tiles(x: Tensor) -> int:
    """Of x (pictures, channels, height, width)."""
    return len(x) * -(-x.shape[2] // _OUT) * -(-x.shape[3] // _OUT)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, filters: Tensor) -> Tensor:
    """x (pictures, channels, height, width) with weight (outputs, channels, 3, 3), padded by one.

    float32 on the CPU; channels and outputs are whole sixteens. filters: memory for the turned
    ones, 36 · channels · outputs float32. The result's channels lie side by side, as
    `channels_last`.
    """
    (pictures, channels, height, width), outputs = x.shape, len(weight)
    given = x.detach().permute(0, 2, 3, 1).contiguous().view(-1).numpy()
    plain = weight.detach().permute(2, 3, 1, 0).contiguous().view(-1).numpy()
    added = x.new_zeros(outputs) if bias is None else bias.detach()
    out, panels = x.new_empty(pictures, height, width, outputs), filters.numpy()
    arrays = panels, outputs, added.contiguous().numpy(), out.view(-1).numpy()

    def turn(first: int, end: int) -> None:
        _turn_filters(plain, channels, outputs, first, end, panels)

    def work(first: int, end: int) -> None:
        _convolve(given, height, width, channels, *arrays, first, end)

    in_threads(turn, channels, outputs)
    in_threads(work, tiles(x), PLANES * channels * outputs)
    return out.permute(0, 3, 1, 2)
