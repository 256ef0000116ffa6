"""A report as a picture: relative errors by place in the model, coloured by type."""

import math
import os

from .errors import GGUFError
from .report import Report, Row, size_text

_WIDTH, _HEIGHT = 1200, 640
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 30, 84, 90  # margins around the axes, in pixels
_INK, _PALE, _PAPER = (34, 34, 34), (221, 221, 221), (255, 255, 255)
# Paul Tol's bright scheme, told apart by colour-blind eyes too; then again from the start.
_COLOURS = ((68, 119, 170), (238, 102, 119), (34, 136, 51), (204, 187, 68), (102, 204, 238),
            (170, 51, 119), (120, 120, 120))  # fmt: skip


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG. Raises: GGUFError without Pillow, or where it cannot be written."""
    picture = picture_of(report)
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise GGUFError(f"{path}: cannot be written: {error.strerror or error}") from error


def picture_of(report: Report):
    """The plot as a PIL image, 1200 x 640 RGB."""
    image, image_draw = pillow()
    picture = image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen = image_draw.Draw(picture)
    rows = [row for row in report.rows if row.errors and row.errors.squared_error]
    _write(pen, (_LEFT, 14), report.title, 16)
    _write(pen, (_LEFT, 38), report.summary(), 14)
    if not rows:
        _write(pen, (_LEFT, _HEIGHT // 2), "no tensor differs", 16)
        return picture
    low, high = _axis(pen, [row.errors.relative for row in rows])
    colours = _legend(pen, rows)
    for x, row in zip(_columns(len(rows)), rows, strict=True):
        share = (math.log10(max(row.errors.relative, 10.0**low)) - low) / (high - low)
        top = _HEIGHT - _BOTTOM - min(share, 1.0) * (_HEIGHT - _TOP - _BOTTOM)
        width = max(1.0, 0.8 * (_WIDTH - _LEFT - _RIGHT) / len(rows))
        pen.rectangle((x, top, x + width, _HEIGHT - _BOTTOM), fill=colours[row.qtype])
    return picture


def pillow():
    """Pillow's modules Image and ImageDraw. Raises: GGUFError with the remedy without them."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise GGUFError("plots need Pillow: python -m pip install pillow") from error
    return Image, ImageDraw


def _columns(count: int) -> list[float]:
    """The left edges of `count` bars."""
    step = (_WIDTH - _LEFT - _RIGHT) / count
    return [_LEFT + step * i for i in range(count)]


def _axis(pen, values: list[float]) -> tuple[int, int]:
    """Draw a logarithmic axis; the powers of ten at its ends."""
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    high = max(high, low + 1)
    for power in range(low, high + 1):
        y = _HEIGHT - _BOTTOM - (power - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        pen.line((_LEFT, y, _WIDTH - _RIGHT, y), fill=_PALE)
        _write(pen, (20, y - 8), f"{10.0**power:g}", 13)
    _write(pen, (20, _TOP - 22), "relative error", 13)
    _write(pen, (_LEFT, _HEIGHT - _BOTTOM + 8), "tensors, in the file's order", 13)
    return low, high


def _legend(pen, rows: list[Row]) -> dict[str, tuple[int, int, int]]:
    """Draw which colour is which type; colours by type, the largest share first."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.qtype] = sizes.get(row.qtype, 0) + row.nbytes
    names = sorted(sizes, key=lambda name: -sizes[name])
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    x, y = _LEFT, _HEIGHT - 44
    for name, colour in colours.items():
        text = f"{name} {size_text(sizes[name])}"
        pen.rectangle((x, y, x + 14, y + 14), fill=colour)
        _write(pen, (x + 20, y - 1), text, 13)
        x += 44 + 8 * len(text)
        if x > _WIDTH - 150:
            x, y = _LEFT, y + 20
    return colours


def _write(pen, place: tuple[float, float], text: str, size: int) -> None:
    room = int((_WIDTH - place[0]) / (0.56 * size))
    text = text if len(text) <= room else "…" + text[1 - room :]
    pen.text(place, text, fill=_INK, font_size=size)
