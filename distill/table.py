"""The tables of a folder of runs, made from evaluations.jsonl and noise.jsonl: `docs/distilled.md`.

Of several lines that measure the same thing the last one counts.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

CATEGORIES = (
    "single object",
    "two objects",
    "counting",
    "colours",
    "position",
    "attribute binding",
)
EVALUATIONS, NOISE = "evaluations.jsonl", "noise.jsonl"  # in a folder of runs
_SAME = ("name", "steps", "cfg", "encoders", "captions", "ratio", "renoise", "sigma")


def rows(path: Path) -> list[dict]:
    """The lines of a JSON Lines file; none if there is no file."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({tuple(row.get(key) for key in _SAME): row for row in lines}.values())


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of text."""
    parts = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(part)} |" for part in parts)


def scores(evaluations: list[dict]) -> str:
    """Every run, as it is drawn: categories in %, and how much faster than the first teacher."""
    lines = []
    for row in (row for row in evaluations if "ratio" not in row):
        shares = [f"{100 * row[key]:.1f}" for key in (*CATEGORIES, "overall", "right")]
        drawn = [row["name"], str(row["steps"]), f"{row['cfg']:g}", row["encoders"]]
        measured = [f"{row['frechet']:.4f}", f"{row['seconds']:.2f} s", str(row["captions"])]
        lines.append(drawn + shares + measured)
    heads = ["run", "steps", "CFG", "encoders", *CATEGORIES, "overall", "right"]
    return markdown([*heads, "Fréchet", "a picture", "captions"], lines)


def sweep(evaluations: list[dict]) -> str:
    """Merge ratios of the two branches."""
    merged = [row for row in evaluations if "ratio" in row]
    lines = [
        [
            row["name"],
            f"{row['ratio']:g}",
            f"{100 * row['overall']:.1f}",
            f"{100 * row['right']:.1f}",
        ]
        for row in sorted(merged, key=lambda row: (row["name"], row["ratio"]))
    ]
    return markdown(["run", "share of the high branch", "overall", "right"], lines)


def noises(measured: list[dict]) -> str:
    """The gradient's noise scale with either way of re-noising."""
    lines = [
        [
            row["name"],
            row["renoise"],
            f"{row['sigma']:g}",
            f"{row['scale']:.0f}",
            str(row["batches"]),
        ]
        for row in measured
    ]
    return markdown(["student and proxy of", "re-noising", "step at", "samples", "batches"], lines)


def lengths(folder: Path) -> str:
    """How long each run was trained: the last line of its losses."""
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        if path.name not in (EVALUATIONS, NOISE):
            row = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
            minutes = f"{row['seconds'] / 60:.0f}"
            lines.append([path.stem, str(row["step"]), str(row["samples"]), minutes])
    return markdown(["run", "steps", "samples", "minutes"], lines)


def page(folder: Path) -> str:
    """The whole page."""
    evaluations = rows(folder / EVALUATIONS)
    return f"""# The miniature, distilled

`python -m distill table` makes this page from the runs' own logs.

Shares in % of captions that were kept from training, in GenEval's six categories and their mean
(overall); right: everything at once, the background too (`demo/categories.py`). Fréchet: distance
to true scenes of the same captions in features of the scene VAE. A picture: seconds in plain torch,
on the machine that measured, others working on it too.

{scores(evaluations)}

## How long the runs were trained

On the machine that trained them, other work beside them; as last logged.

{lengths(folder)}

## Merging the two branches of split-timestep fine-tuning

{sweep(evaluations)}

## Noise of the student's gradient

The batch in samples at which noise and signal are equal (`distill/noise.py`); a smaller one is
better.

{noises(rows(folder / NOISE))}
"""
