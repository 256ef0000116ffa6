"""Results as SVG pictures: bars of a step's time by side, and lines of how it grows.

python -m bench.chart [speed.json …]     draws again what `python -m bench` saved
"""

import json
import math
import sys
from html import escape
from pathlib import Path

from . import table

# Paul Tol's bright scheme, told apart by colour-blind eyes too.
COLOURS = {
    "fewstep": "#4477aa",
    "runtime": "#66ccee",
    "host": "#777777",
    "peer-gguf": "#ee6677",
    "cpp": "#ccbb44",
}
WIDTH, LEFT, ROW = 760, 190, 24
INK, PALE = "#888888", "#dddddd"  # seen on light and on dark pages


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{INK}">'
        f"{escape(words)}</text>"
    )


def picture(height: float, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}"'
    return "\n".join([f'{head} font-family="sans-serif">', *parts, "</svg>"]) + "\n"


def bars(result: dict) -> str:
    """What `python -m bench` measured: a group for each type and size, a bar for each side."""
    parts, y = [text(0, 16, "Seconds a sampling step takes; in brackets: times ours", size=15)], 44
    for row in result["steps"]:
        medians = table.exact_medians(row["turns"])
        parts.append(text(0, y, f"{row['type']}, {row['pixels']} × {row['pixels']} pixels"))
        for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
            y += ROW
            length = (WIDTH - LEFT - 130) * seconds / max(medians.values())
            beside = f"{seconds:.2f} s"
            if name != table.OURS and table.OURS in medians:
                beside += f"  ({table.ratio(row['turns'], name, table.OURS).split()[0]})"
            parts += [
                text(LEFT - 8, y + 13, table.LABELS[name], "end"),
                f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW - 6}" '
                f'fill="{COLOURS[name]}"/>',
                text(LEFT + length + 6, y + 13, beside),
            ]
        y += 2 * ROW
    told = result["setting"]
    parts.append(text(0, y, f"{told['processor']}, {told['threads']} threads", size=11))
    return picture(y + 10, parts)


def lines(title: str, below: str, series: dict[str, dict[float, float]]) -> str:
    """A line for each side: seconds by number, both axes logarithmic."""
    height, top, right, bottom = 420, 40, 150, 60
    xs = sorted({x for line in series.values() for x in line})
    ys = [y for line in series.values() for y in line.values()]
    ticks = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5)]
    low = max((t for t in ticks if t <= min(ys)), default=min(ys))
    high = min((t for t in ticks if t >= max(ys)), default=max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / xs[0]) / (math.log(xs[-1] / xs[0]) or 1)
        up = math.log(y / low) / (math.log(high / low) or 1)
        return 60 + across * (WIDTH - 60 - right), height - bottom - up * (height - top - bottom)

    parts = [text(0, 16, title, size=15)]
    for tick in (t for t in ticks if low <= t <= high):
        _, y = at(xs[0], tick)
        parts += [
            f'<line x1="60" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{PALE}"/>',
            text(52, y + 4, f"{tick:g} s", "end"),
        ]
    parts += [text(at(x, low)[0], height - bottom + 18, f"{x:g}", "middle") for x in xs]
    parts.append(text((60 + WIDTH - right) / 2, height - bottom + 40, below, "middle"))
    for name, line in series.items():
        points = [at(x, y) for x, y in sorted(line.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        colour = COLOURS[name]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        x, y = points[-1]
        parts.append(text(x + 8, y + 4, table.LABELS[name], size=12))
    return picture(height, parts)


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        path.with_suffix(".svg").write_text(bars(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
