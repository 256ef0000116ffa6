"""A second pair of eyes: what a picture shows, seen another way than `score` sees it.

Colours are named by hue, saturation and value, as people name them; what is not named as the border
is, and hangs together, is an object. Its shape is told by the outline's distance from the middle in
every direction: how often that rises and falls in one turn, by its Fourier coefficients, and
whether there is a hole. Neither the palette nor the drawing of scenes is used.
Source of the descriptor: Zahn and Roskies 1972, Fourier descriptors for plane closed curves, here
of the radius instead of the angle.
"""

import numpy as np
from scipy import ndimage

from .score import Found

# upper end of each hue in degrees; red comes round again
HUES = ((18, "red"), (44, "orange"), (75, "yellow"), (160, "green"), (200, "cyan"), (262, "blue"))
HUES += ((340, "purple"), (361, "red"))
DARK, PALE, BRIGHT = 0.25, 0.2, 0.85  # value of black, saturation of grays, value of white
SMALLEST = 0.004  # share of the picture below which a region is a speck
BINS = 72  # directions in which the outline is followed
ROUND = 0.05  # share of the radius by which a circle's may change
CLEAR = 0.7  # share of the outline's changes that must be of one kind
WHOLE = 0.1  # share by which the area may differ from the outline's
PLAIN = 0.85  # share of an object that must be of its colour


def names(picture: np.ndarray) -> np.ndarray:
    """The colour's name of every pixel of a picture (h, w, 3) uint8."""
    rgb = picture.astype(np.float64) / 255
    value, least = rgb.max(2), rgb.min(2)
    chroma = value - least
    spread = np.maximum(chroma, 1e-9)
    r, g, b = np.moveaxis(rgb, 2, 0)
    hue = np.where(value == r, (g - b) / spread % 6, (b - r) / spread + 2)
    hue = 60 * np.where((value == b) & (value != r) & (value != g), (r - g) / spread + 4, hue)
    ends, called = zip(*HUES, strict=True)
    named = np.array(called, object)[np.searchsorted(ends, hue, side="right")]
    pale = chroma < PALE * np.maximum(value, 1e-9)
    named[pale] = np.where(value[pale] > BRIGHT, "white", "gray")
    named[value < DARK] = "black"
    return named


def shape_of(region: np.ndarray) -> str | None:
    """The shape of a region (h, w) bool; None for none of the six."""
    filled = ndimage.binary_fill_holes(region)
    y, x = ndimage.center_of_mass(filled)
    edge = filled & ~ndimage.binary_erosion(filled)
    rows, columns = np.nonzero(edge)
    turn = np.arctan2(y - rows, columns - x) / (2 * np.pi) % 1
    radius = np.zeros(BINS)
    np.maximum.at(radius, (turn * BINS).round().astype(int) % BINS, np.hypot(rows - y, columns - x))
    seen = np.flatnonzero(radius)
    radius = np.interp(np.arange(BINS), seen, radius[seen], period=BINS) + 0.5
    area = np.pi * np.square(radius).mean()
    if abs(filled.sum() / area - 1) > WHOLE:
        return None
    waves = 2 * np.fft.rfft(radius / radius.mean())[1:13] / BINS
    power = np.square(np.abs(waves))
    hole = 1 - region.sum() / filled.sum()
    if np.abs(waves).max() < ROUND:
        return "circle" if hole < 0.02 else "ring" if 0.15 < hole < 0.5 else None
    order = 3 + int(power[2:5].argmax())
    if hole > 0.02 or power[order - 1 :: order].sum() < CLEAR * power.sum():
        return None
    if order == 4:  # the corners of a square lie between the arms of a cross
        return "cross" if waves[3].real > 0 else "square"
    return "triangle" if order == 3 else "star"


def look(picture: np.ndarray) -> tuple[str | None, list[Found]]:
    """Background colour and objects of a picture (h, w, 3) uint8, as `score.look` gives them."""
    named = names(picture)
    border = np.concatenate([named[0], named[-1], named[1:-1, 0], named[1:-1, -1]])
    called, counts = np.unique(border.astype(str), return_counts=True)
    ground = called[counts.argmax()]
    if counts.max() < PLAIN * border.size:
        return None, []
    labels, number = ndimage.label(named != ground, np.ones((3, 3)))
    found = []
    for i in range(1, number + 1):
        region = labels == i
        if region.sum() < SMALLEST * region.size:
            continue
        inside = ndimage.binary_erosion(region, iterations=2)
        colours = named[inside if inside.any() else region].astype(str)
        called, counts = np.unique(colours, return_counts=True)
        plain = counts.max() >= PLAIN * colours.size
        y, x = ndimage.center_of_mass(region)
        found.append(Found(called[counts.argmax()] if plain else None, shape_of(region), x, y))
    return ground, found
