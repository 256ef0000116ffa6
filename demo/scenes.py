"""Draw the picture that a caption names: flat colours, anti-aliased edges, random place and size.

Every shape is a signed distance in its own units (negative inside, 1 = the object's radius), and
the coverage of a pixel is `0.5 - distance in pixels`; only the window around an object is computed.
Objects keep near fixed spots, so that they can neither overlap nor leave the picture, and so that a
small model has less to learn.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .captions import PALETTE, Caption

SIZE = 128  # pixels, the side of every picture

# Where objects lie, give or take JITTER: (x, y) in pixels from the top left.
_CENTRE = [(64, 64)]
_BESIDE = [(34, 64), (94, 64)]
_STACKED = [(64, 34), (64, 94)]
_ONE_ABOVE_TWO = [(64, 34), (34, 94), (94, 94)]
_TWO_ABOVE_ONE = [(34, 34), (94, 34), (64, 94)]
_LAYOUTS = {1: [_CENTRE], 2: [_BESIDE, _STACKED], 3: [_ONE_ABOVE_TWO, _TWO_ABOVE_ONE]}
_RELATED = {
    "left of": _BESIDE,
    "right of": _BESIDE[::-1],
    "above": _STACKED,
    "below": _STACKED[::-1],
}
JITTER = {1: 6, 2: 3, 3: 3}  # pixels each way, by the number of objects
RADIUS = {1: (32, 42), 2: (18, 24), 3: (17, 23)}  # pixels


Place = tuple[float, float, float]


def layouts(caption: Caption) -> list[list[tuple[int, int]]]:
    """Every way to lay out a caption's objects: the spot (x, y) near which each lies."""
    return [_RELATED[caption.relation]] if caption.relation else _LAYOUTS[len(caption.objects)]


def place(caption: Caption, rng: np.random.Generator) -> list[Place]:
    """Centre x, centre y and radius in pixels of each of a caption's objects."""
    number, ways = len(caption.objects), layouts(caption)
    spots = np.array(ways[rng.integers(len(ways))])
    centres = spots + rng.uniform(-JITTER[number], JITTER[number], spots.shape)
    radii = rng.uniform(*RADIUS[number], number)
    return [(*map(float, centre), float(r)) for centre, r in zip(centres, radii, strict=True)]


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.775) - 0.225


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.32)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Apex (0, -0.95), base from (-0.98, 0.75) to (0.98, 0.75): all but equilateral, pointing up.
    nx, ny = 1.70 / math.hypot(1.70, 0.98), -0.98 / math.hypot(1.70, 0.98)
    return np.maximum(np.abs(x) * nx + (y + 0.95) * ny, y - 0.75)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Five points, one up. Source: Inigo Quilez, sdStar5: two reflections fold the plane into the
    # tenth between a tip and the notch beside it, where the outline is one straight line.
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = np.abs(x), -y
    fold = 2 * np.maximum(cos * x - sin * y, 0)
    x, y = x - cos * fold, y + sin * fold
    fold = 2 * np.maximum(-cos * x - sin * y, 0)
    x, y = np.abs(x + cos * fold), y + sin * fold
    notch_x, notch_y = 0.45 * sin, 0.45 * cos
    length = math.hypot(notch_x, 1 - notch_y)
    return x * ((1 - notch_y) / length) + (y - 1) * (notch_x / length)


DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


def coverage(
    shape: str, x: np.ndarray, y: np.ndarray, radius: float, line: float = 0.0
) -> np.ndarray:
    """Share inside the shape of pixels whose centres lie (x, y) pixels from its own: in [0, 1].

    `line`: of its outline alone, so many pixels wide, in place of the whole shape.
    """
    distance = DISTANCES[shape](x / radius, y / radius) * radius
    if line:
        distance = np.abs(distance + line / 2) - line / 2
    return np.clip(0.5 - distance, 0, 1)


def silhouette(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """An axis (n,) in radii around the origin, and which points (n, n) lie inside the shape."""
    axis = np.linspace(-1.2, 1.2, 481)
    return axis, coverage(shape, 1000 * axis[None, :], 1000 * axis[:, None], 1000) > 0.5


def _draw_into(picture: np.ndarray, caption: Caption, places: Sequence[Place], line: float) -> None:
    ground = np.float32(PALETTE[caption.background])[:, None, None] / 255
    picture[:] = ground
    for (colour, shape), (x, y, radius) in zip(caption.objects, places, strict=True):
        reach = radius + 1
        columns = np.arange(max(int(x - reach), 0), min(int(x + reach) + 1, SIZE))
        rows = np.arange(max(int(y - reach), 0), min(int(y + reach) + 1, SIZE))
        dx, dy = np.float32(columns + 0.5 - x), np.float32(rows + 0.5 - y)
        cover = coverage(shape, dx[None, :], dy[:, None], radius, line)
        window = picture[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        window += cover * (np.float32(PALETTE[colour])[:, None, None] / 255 - ground)


def render(
    captions: Sequence[Caption], places: Sequence[Sequence[Place]], line: float = 0.0
) -> Tensor:
    """Pictures (n, 3, 128, 128) float32 in [0, 1] of the captions, objects at their places.

    `line`: see `coverage`.
    """
    pictures = np.empty((len(captions), 3, SIZE, SIZE), np.float32)
    for picture, caption, spots in zip(pictures, captions, places, strict=True):
        _draw_into(picture, caption, spots, line)
    return torch.from_numpy(pictures.clip(0, 1, out=pictures))


def draw(captions: Sequence[Caption], rng: np.random.Generator) -> Tensor:
    """Pictures (n, 3, 128, 128) float32 in [0, 1] of the captions, objects placed at random."""
    return render(captions, [place(caption, rng) for caption in captions])
