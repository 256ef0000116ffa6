"""The tables of a folder of runs, made from what they logged: `docs/distilled.md`."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from .claims import STUDENT, TEACHER, claims
from .logs import (
    CATEGORIES,
    EVALUATIONS,
    NOISE,
    PLAIN,
    SHIPPED,
    TIMES,
    full_size,
    rows,
    setting,
    sharing,
    timed,
)

_LOGGED = {"step", "samples", "seconds"}  # with each loss


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of text."""
    parts = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(part)} |" for part in parts)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def shares(row: dict) -> list[str]:
    """What is told of a run in a word: overall, right, Fréchet distance."""
    return [percent(row["overall"]), percent(row["right"]), f"{row['frechet']:.4f}"]


def scores(evaluations: list[dict]) -> str:
    """Every run as it is drawn by default, on the most captions it was scored on, in %."""
    lines, plain = [], {}
    for row in sorted(evaluations, key=lambda row: row["captions"]):
        if row["encoders"] == PLAIN and "ratio" not in row and "recipe" not in row:
            plain[row["name"], row["steps"], row["cfg"]] = row
    for row in plain.values():
        each = [percent(row[key]) for key in (*CATEGORIES, "overall", "right")]
        drawn = [row["name"], str(row["steps"]), f"{row['cfg']:g}"]
        lines.append(drawn + each + [f"{row['frechet']:.4f}", str(row["captions"])])
    heads = ["run", "steps", "CFG", *CATEGORIES, "overall", "right", "Fréchet", "captions"]
    return markdown(heads, lines)


def speeds(times: list[dict]) -> str:
    """Student's and teacher's seconds a picture, and how many times the one the other is."""
    lines = []
    for pair in timed(times, STUDENT, TEACHER):
        told = []
        for key in ("seconds", "sampling"):
            own, slow = (row[key] for row in pair)
            told += [f"{own:.3f} s", f"{slow:.3f} s", f"{slow / own:.1f}"]
        lines.append(setting(pair[0]) + told)
    heads = ["drawn", "processor", "threads"]
    for what in ("", "sampling: "):
        heads += [f"{what}{each}" for each in ("student", "teacher", "times")]
    return markdown(heads, lines)


def files(shipped: list[dict]) -> str:
    """What ships, drawn by ComfyUI, by both scorers."""
    lines = [
        [row["name"], row["sha256"], str(row["steps"]), f"{row['cfg']:g}", row["scorer"]]
        + [percent(row[key]) for key in (*CATEGORIES, "overall", "right", "agree")]
        + [str(row["captions"])]
        for row in shipped
    ]
    heads = ["file", "sha256", "steps", "CFG", "scorer", *CATEGORIES, "overall", "right"]
    return markdown([*heads, "agree", "captions"], lines)


def variants(evaluations: list[dict], key: str, head: str) -> str:
    """Runs that were scored with several values of `key`, "encoders" or "recipe", on as many
    captions.
    """
    seen = defaultdict(set)
    for row in evaluations:
        seen[row["name"], row["steps"], row["captions"]].add(row.get(key))
    lines = [
        [row["name"], str(row["steps"]), row[key], *shares(row), str(row["captions"])]
        for row in evaluations
        if len(seen[row["name"], row["steps"], row["captions"]]) > 1
        if row.get(key) and "ratio" not in row
        if key == "recipe" or "recipe" not in row
    ]
    return markdown(["run", "steps", head, "overall", "right", "Fréchet", "captions"], lines)


def seeds(evaluations: list[dict]) -> str:
    """Timestep sharing against random re-noising: each seed, and mean and deviation over them."""
    lines = []
    for how, runs in sharing(evaluations).items():
        for row in runs:
            lines.append([how, str(row["seed"]), str(row["trained"]), *shares(row)])
        if len(runs) > 1:
            parts = {
                key: (statistics.mean(r[key] for r in runs), statistics.stdev(r[key] for r in runs))
                for key in ("overall", "right", "frechet")
            }
            ends = [f"{100 * m:.1f} ± {100 * d:.1f}" for m, d in list(parts.values())[:2]]
            ends.append("{:.4f} ± {:.4f}".format(*parts["frechet"]))
            lines.append([how, "mean", str(runs[0]["trained"]), *ends])
    return markdown(["re-noising", "seed", "samples", "overall", "right", "Fréchet"], lines)


def sweep(evaluations: list[dict]) -> str:
    """Merge ratios of the two branches."""
    merged = sorted(
        (row for row in evaluations if "ratio" in row), key=lambda r: (r["name"], r["ratio"])
    )
    lines = [
        [row["name"], f"{row['ratio']:g}", *shares(row), str(row["captions"])] for row in merged
    ]
    heads = ["run", "share of the high branch", "overall", "right", "Fréchet", "captions"]
    return markdown(heads, lines)


def noises(measured: list[dict]) -> str:
    """The gradient's noise scale with either way of re-noising."""
    ordered = sorted(measured, key=lambda r: (r["renoise"] != "shared", r["name"], -r["sigma"]))
    lines = [
        [row[key] for key in ("name", "renoise")]
        + [f"{row['sigma']:g}", f"{row['scale']:.0f}", str(row["batches"])]
        for row in ordered
    ]
    return markdown(["student and proxy of", "re-noising", "step at", "samples", "batches"], lines)


def lengths(folder: Path) -> str:
    """How long each run was trained: the last line of its losses."""
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        logged = [row for row in rows(path) if row.keys() >= _LOGGED]
        for row in logged[-1:]:
            minutes = f"{row['seconds'] / 60:.0f}"
            lines.append([path.stem, str(row["step"]), str(row["samples"]), minutes])
    return markdown(["run", "steps", "samples", "minutes"], lines)


def page(folder: Path) -> str:
    """The whole page. Raises: ValueError where no run of `folder` was scored."""
    if not (folder / EVALUATIONS).exists():
        raise ValueError(f"{folder} holds no {EVALUATIONS}: score a run first (eval)")
    evaluations, times = rows(folder / EVALUATIONS), rows(folder / TIMES)
    measured, shipped = rows(folder / NOISE), rows(folder / SHIPPED)
    heads = ["claim", "here", "to reach", "reproduced"]
    return f"""# The miniature, distilled

`python -m distill table` makes this page from the runs' own logs. Shares in % of captions that were
kept from training, in GenEval's six categories and their mean (overall); right: everything at once,
the background too (`demo/categories.py`). A caption is asked about in one category, in two or in
three, so that their shares are often alike. Fréchet: distance to true scenes of the same captions
in features of the scene VAE; it falls as captions grow in number.

## What holds

{markdown(heads, claims(evaluations, times, measured, full_size(folder), shipped))}

## Teacher and students

trajectory: stage 1, whose ways are straight and end at the right picture nearest to the teacher's
(`chords` and `mend` in `distill/trajectory.py`). trajectory-2: a second round, on ways of its own
that are mended anew: so a student can be better than its teacher. match: stage 2. split: stage 3,
merged. These two teach the four steps alone; two steps are what stage 1 has left of them. plain,
mended: a short stage 1 on the same trajectories, towards the teacher's own ends along its own ways
(the paper's regression), and towards right ones along straight ways. plain-long: as plain, with as
many samples as trajectory; plain-match: stage 2 from there, by match's settings.

Without T5's tokens.

{scores(evaluations)}

## Seconds a picture

Through ComfyUI, student and teacher in turns (`python -m distill time --pictures N`): text,
sampling and VAE of a sentence, of which N pictures are drawn at once; sampling: those of them that
depend on the steps. Only sampling is shortened. Of one small picture at a time most is what a call
takes however little it computes; and the miniature's VAE has four times the arithmetic of a call of
its model, SD3's about that of one call of SD3.5-Medium. What a model of that size takes, its
weights random, `python -m bench.distilled --out FOLDER` measures.

{speeds(times)}

## What ships

The files in `demo/models`, drawn by ComfyUI by CLIP-L alone (`python -m distill shipped`; the rows
above are of unquantised weights, drawn in plain torch). Two scorers that share no code see each
picture: by the outline that fits best (`demo/score.py`), by hue and radius (`demo/second_look.py`).
agree: the share of pictures that both call right, or both wrong.

{files(shipped)}

## Encoders

both: CLIP-L and T5; no t5, no clip: its tokens left out, as where it is not loaded; zero t5, zero
clip: zeros for what it says. The T5 is the last that was made for the teacher (align-2, then
either); students never saw it. The student's rows are of the file that ships, in 6 bits, but for
the one without T5's tokens, which is of unquantised weights.

{variants(evaluations, "encoders", "encoders")}

## Bits

The same weights in a file of each of `quant`'s recipes.

{variants(evaluations, "recipe", "recipe")}

## Timestep sharing against random re-noising

The same start (trajectory, by the same recipe, trained where these were), as many samples, the same
settings but for `renoise`.

{seeds(evaluations)}

The noise of the student's gradient: the batch in samples at which noise and signal are equal
(`distill/noise.py`); a smaller one is better.

{noises(measured)}

## Merging the two branches of split-timestep fine-tuning

{sweep(evaluations)}

## How long the runs were trained

As last logged, on the machine that trained them, other work beside them.

{lengths(folder)}
"""
