"""The scene nearest to a picture that tries to show a caption: where its objects are meant to be.

Each object is looked for around each spot where it may lie; its place and size are read off the
pixels that have its colour rather than the background's, by their centre of mass and their number.
"""

from functools import cache

import numpy as np

from .captions import PALETTE, Caption
from .scenes import JITTER, RADIUS, SIZE, Place, layouts, silhouette

_AXIS = np.arange(SIZE) + 0.5


def nearest_places(picture: np.ndarray, caption: Caption) -> list[Place]:
    """Centre x, centre y and radius in pixels of each object, within the limits of the scenes.

    `picture` is (3, 128, 128) float32 in [0, 1] or thereabouts. Of several layouts the one counts
    that has the most of the objects' colours at its spots.
    """
    solids = _solids(picture, caption)
    finds = [_look_at(solids, caption, spots) for spots in layouts(caption)]
    return max(finds, key=lambda find: find[0])[1]


def _solids(picture: np.ndarray, caption: Caption) -> list[np.ndarray]:
    """For each object the pixels (128, 128) whose colour is its rather than the background's."""
    ground, solids = np.float32(PALETTE[caption.background]) / 255, []
    for colour, _ in caption.objects:
        step = np.float32(PALETTE[colour]) / 255 - ground
        solids.append(np.tensordot(step, picture, 1) > step @ (ground + step / 2))
    return solids


def _look_at(solids: list[np.ndarray], caption: Caption, spots) -> tuple[int, list[Place]]:
    objects = zip(solids, caption.objects, spots, strict=True)
    found = [_measure(solid, shape, spot, len(spots)) for solid, (_, shape), spot in objects]
    return sum(seen for seen, _ in found), [place for _, place in found]


def _measure(solid: np.ndarray, shape: str, spot, number: int) -> tuple[int, Place]:
    smallest, largest = RADIUS[number]
    near = (np.abs(_AXIS - spot[0]) < 30)[None] & (np.abs(_AXIS - spot[1]) < 30)[:, None]
    area, right, down = _moments(shape)
    solid = solid & near if number > 1 else solid
    seen = int(solid.sum())
    if not seen:
        return 0, (*map(float, spot), (smallest + largest) / 2)
    radius = float(np.clip(np.sqrt(seen / area), smallest, largest))
    centre = (
        solid.sum(0) @ _AXIS / seen - right * radius,
        solid.sum(1) @ _AXIS / seen - down * radius,
    )
    low, high = np.array(spot) - JITTER[number], np.array(spot) + JITTER[number]
    x, y = np.clip(centre, low, high)
    return seen, (float(x), float(y), radius)


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centre of mass (right, down) of a shape of radius 1 around the origin."""
    axis, inside = silhouette(shape)
    area = inside.sum() * (axis[1] - axis[0]) ** 2
    return (
        float(area),
        float(axis @ inside.sum(0) / inside.sum()),
        float(axis @ inside.sum(1) / inside.sum()),
    )
