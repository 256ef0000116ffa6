"""Does a picture show what its caption says? An exact scorer that sees pixels and nothing else.

Background: the median colour of the border. Objects: connected regions that differ from it. An
object's colour is its median, named by the nearest colour of the palette; its shape is the one of
the six whose ideal outline, fitted to the region, covers it best, if no part is missing or too
much. Slight blur and noise change no verdict; a wrong colour, shape, number or order does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from .captions import COLOURS, PALETTE, SHAPES, Caption, parse_caption
from .scenes import coverage, silhouette

NAMED = 70  # RGB distance within which a colour deserves its name
APART = 40  # RGB distance from the background at which an object begins
SMALLEST = 0.004  # share of the picture below which a region is a speck, no object
STRAY = 0.01  # share of the ground that may differ from it: specks
FIT = 0.8  # overlap with the ideal shape, intersection over union, that a shape must reach
FAULT = 0.12  # radius of the largest disc that may be missing or too much, in the shape's radius
FLAT = 0.85  # share of an object's inside that must have its colour

_COLOURS = np.array([PALETTE[colour] for colour in COLOURS], np.float32)


@dataclass(frozen=True)
class Found:
    """An object seen in a picture; None where it has no name. Places in pixels."""

    colour: str | None
    shape: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """What is right. `position` is True where a caption says nothing of it."""

    background: bool
    count: bool
    colour: bool
    shape: bool
    position: bool

    @property
    def right(self) -> bool:
        """Everything is right."""
        return all(getattr(self, field.name) for field in fields(self))


def name_colour(rgb: np.ndarray) -> str | None:
    """The palette's nearest colour, None if it is not near."""
    distances = np.linalg.norm(_COLOURS - rgb, axis=1)
    return COLOURS[distances.argmin()] if distances.min() < NAMED else None


def _extent(shape: str) -> tuple[float, float, float, float]:
    """Left, right, top, bottom of a shape of radius 1 around the origin."""
    axis, inside = silhouette(shape)
    columns, rows = axis[inside.any(0)], axis[inside.any(1)]
    return columns[0], columns[-1], rows[0], rows[-1]


_EXTENTS = {shape: _extent(shape) for shape in SHAPES}


def name_shape(cover: np.ndarray) -> str | None:
    """The shape that fits a region's coverage (h, w) best, None if none fits well.

    Each shape is placed by the region's bounding box; those that then fit nearly best are also
    tried shifted and resized a little.
    """
    fits = {shape: _fit(shape, cover, [(1, 0, 0)]) for shape in SHAPES}
    best = max(fit.overlap for fit in fits.values())
    fits = {s: _fit(s, cover, _NUDGES) for s in SHAPES if fits[s].overlap > best - 0.15}
    shape, fit = max(fits.items(), key=lambda item: item[1].overlap)
    return shape if fit.overlap >= FIT and fit.fault(cover) <= FAULT else None


class _Fit(NamedTuple):
    """An ideal shape laid over a region: intersection over union, coverage (h, w), radius."""

    overlap: float
    ideal: np.ndarray
    radius: float

    def fault(self, cover: np.ndarray) -> float:
        """Radius of the largest disc that is in one and not in the other, in radii of the shape."""
        differs = np.pad(np.abs(self.ideal - cover) > 0.5, 1)
        return ndimage.distance_transform_edt(differs).max() / self.radius


_NUDGES = list(product((0.95, 1, 1.05), (-0.04, 0, 0.04), (-0.04, 0, 0.04)))


def _fit(shape: str, cover: np.ndarray, nudges: list[tuple[float, float, float]]) -> _Fit:
    """The best fit over (size, shift x, shift y), in shares of the size."""
    solid = cover > 0.5
    columns, rows = np.flatnonzero(solid.any(0)), np.flatnonzero(solid.any(1))
    x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    left, right, top, bottom = _EXTENTS[shape]
    wide, high = (x1 - x0) / (right - left), (y1 - y0) / (bottom - top)
    x, y = (x0 + x1 - wide * (left + right)) / 2, (y0 + y1 - high * (top + bottom)) / 2
    best = _Fit(0.0, np.zeros_like(cover), 1.0)
    if not 0.75 < wide / high < 1.33:
        return best
    grid_x, grid_y = np.arange(cover.shape[1]) + 0.5 - x, np.arange(cover.shape[0]) + 0.5 - y
    for size, dx, dy in nudges:
        radius = size * (wide + high) / 2
        ideal = coverage(shape, grid_x[None] - dx * wide, grid_y[:, None] - dy * high, radius)
        overlap = np.minimum(ideal, cover).sum() / np.maximum(ideal, cover).sum()
        best = max(best, _Fit(overlap, ideal, radius), key=lambda fit: fit.overlap)
    return best


def _look_at(picture: np.ndarray, region: np.ndarray, ground: np.ndarray) -> Found:
    """Name the object in a region (h, w) bool of a picture (h, w, 3) float32."""
    y, x = ndimage.center_of_mass(region)
    inside = ndimage.binary_erosion(region, iterations=2)
    pixels = picture[inside if inside.sum() >= 20 else region]
    colour = np.median(pixels, axis=0)
    near = np.linalg.norm(pixels - colour, axis=1) < NAMED
    name = name_colour(colour) if near.mean() >= FLAT else None
    step = colour - ground
    rows, columns = ndimage.find_objects(np.uint8(ndimage.binary_dilation(region, iterations=3)))[0]
    cover = ((picture - ground) @ step / (step @ step)).clip(0, 1)
    cover = (cover * ndimage.binary_dilation(region, iterations=2))[rows, columns]
    return Found(name, name_shape(cover) if cover.max() > 0.5 else None, x, y)


def look(picture: np.ndarray) -> tuple[str | None, list[Found]]:
    """Background colour and objects of a picture (h, w, 3) uint8, at least 64 pixels a side."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or min(picture.shape[:2]) < 64:
        raise ValueError(
            f"expected a picture (h, w, 3) of uint8, 64 pixels or more a side, but got "
            f"{picture.shape} of {picture.dtype}"
        )
    picture = picture[..., :3].astype(np.float32)
    inner = np.zeros(picture.shape[:2], bool)
    inner[2:-2, 2:-2] = True
    ground = np.median(picture[~inner], axis=0)
    differs = np.linalg.norm(picture - ground, axis=2) > APART
    regions, number = ndimage.label(differs, np.ones((3, 3)))
    sizes = np.bincount(regions.ravel(), minlength=number + 1)
    objects = [i for i in range(1, number + 1) if sizes[i] >= SMALLEST * regions.size]
    specks = sizes[1:].sum() - sizes[objects].sum()
    background = name_colour(ground) if specks < STRAY * regions.size else None
    return background, [_look_at(picture, regions == i, ground) for i in objects]


def _lies(relation: str | None, first: Found, second: Found) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    ahead, aside = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return ahead > abs(aside)


def score(picture: np.ndarray, caption: Caption | str) -> Verdict:
    """Verdict on a picture (h, w, 3) uint8; with objects in any order, the kindest one counts."""
    wanted = caption if isinstance(caption, Caption) else parse_caption(caption)
    return verdict(*look(picture), wanted)


def verdict(ground: str | None, found: Sequence[Found], wanted: Caption) -> Verdict:
    """On what was seen: `look`'s background and objects."""
    background = ground == wanted.background
    if len(found) != len(wanted.objects):
        return Verdict(background, False, False, False, False)
    verdicts = []
    for order in permutations(found):
        pairs = list(zip(order, wanted.objects, strict=True))
        colour = all(seen.colour == colour for seen, (colour, _) in pairs)
        shape = all(seen.shape == shape for seen, (_, shape) in pairs)
        position = wanted.relation is None or _lies(wanted.relation, *order)
        verdicts.append(Verdict(background, True, colour, shape, position))
    return max(verdicts, key=lambda verdict: sum(vars(verdict).values()))


def rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of pictures that are right in all, and in each respect."""
    parts = {
        field.name: np.mean([getattr(verdict, field.name) for verdict in verdicts])
        for field in fields(Verdict)
    }
    return {"right": np.mean([verdict.right for verdict in verdicts])} | parts
