"""The tables of a folder of runs, made from what they logged: `docs/distilled.md`.

Of several lines that measure the same thing the last one counts.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

CATEGORIES = (
    "single object",
    "two objects",
    "counting",
    "colours",
    "position",
    "attribute binding",
)
# Those that the same captions are asked about, a third of all captions each.
ALIKE = (
    ("single object", "colours"),
    ("two objects", "position", "attribute binding"),
    ("counting",),
)
# in a folder of runs
EVALUATIONS, NOISE, TIMES = "evaluations.jsonl", "noise.jsonl", "times.jsonl"
SHIPPED = "shipped.jsonl"
FULL_SIZE = "distilled-*.json"  # there too: what `python -m bench.distilled` measured
TEACHER, STUDENT = "teacher", "split"  # runs that the paper's claims are about
EITHER = "either"  # the teacher with a T5 that is enough alone; once adopted it is TEACHER
SHIPPED_STUDENT, SHIPPED_TEACHER = "fewstep-demo.gguf", "fewstep-teacher.gguf"
FASTER = 18  # times, than the teacher
SEEDS = 3  # of either way of re-noising, before one is called better
PLAIN = "no t5"  # the encoders with which runs are compared
_SCORED = (
    "name",
    "steps",
    "cfg",
    "encoders",
    "captions",
    *CATEGORIES,
    "overall",
    "right",
    "frechet",
)
_SAME = (
    "name", "steps", "cfg", "encoders", "captions", "ratio", "recipe", "renoise", "sigma", "scorer"
)  # fmt: skip


def rows(path: Path) -> list[dict]:
    """The lines of a JSON Lines file; none if there is no file. Raises: ValueError naming a line
    that is no object.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is no JSON object: delete the line"
            ) from error
    return list({tuple(row.get(key) for key in _SAME): row for row in lines}.values())


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of text."""
    parts = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(part)} |" for part in parts)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def shares(row: dict) -> list[str]:
    """What is told of a run in a word: overall, right, Fréchet distance."""
    return [percent(row["overall"]), percent(row["right"]), f"{row['frechet']:.4f}"]


def scores(evaluations: list[dict], times: list[dict]) -> str:
    """Every run as it is drawn by default, on the most captions it was scored on: categories in %,
    and its time through ComfyUI.
    """
    lines, plain = [], {}
    for row in sorted(evaluations, key=lambda row: row["captions"]):
        if row["encoders"] == PLAIN and "ratio" not in row and "recipe" not in row:
            plain[row["name"], row["steps"], row["cfg"]] = row
    for row in plain.values():
        each = [percent(row[key]) for key in (*CATEGORIES, "overall", "right")]
        drawn = [row["name"], str(row["steps"]), f"{row['cfg']:g}"]
        own = next((t for t in times if all(t[k] == row[k] for k in ("name", "steps"))), {})
        seconds = [f"{own[k]:.3f} s" if k in own else "" for k in ("seconds", "sampling")]
        measured = [f"{row['frechet']:.4f}", *seconds, str(row["captions"])]
        lines.append(drawn + each + measured)
    heads = ["run", "steps", "CFG", *CATEGORIES, "overall", "right", "Fréchet"]
    return markdown([*heads, "a picture", "sampling", "captions"], lines)


def error(row: dict) -> float:
    """Standard error of a row's "overall", as if a caption were right in all its categories or in
    none: each share is a binomial one.
    """
    variance = 0.0
    for names in ALIKE:
        share, weight = statistics.mean(row[name] for name in names), len(names) / len(CATEGORIES)
        variance += weight**2 * share * (1 - share) / (row["captions"] / len(ALIKE))
    return variance**0.5


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


def sharing(evaluations: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in re-noising and seed alone, by re-noising: "shared" and "random"."""
    groups = defaultdict(lambda: defaultdict(dict))
    for row in evaluations:
        if row.get("stage") == "match" and row["encoders"] == PLAIN and "recipe" not in row:
            alike = row["trained"], row["steps"], row["captions"]
            groups[alike][row["renoise"]][row["seed"]] = row
    both = [group for group in groups.values() if len(group) > 1]
    chosen = max(both, key=lambda group: sum(map(len, group.values())), default={})
    return {how: list(chosen[how].values()) for how in sorted(chosen, reverse=True)}


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
        if path.name not in (EVALUATIONS, NOISE, TIMES, SHIPPED) and (logged := rows(path)):
            row = logged[-1]
            minutes = f"{row['seconds'] / 60:.0f}"
            lines.append([path.stem, str(row["step"]), str(row["samples"]), minutes])
    return markdown(["run", "steps", "samples", "minutes"], lines)


def full_size(folder: Path) -> list[tuple[str, float, float]]:
    """(picture and device, student's, teacher's seconds a picture) of models in full size: medians
    of the turns.
    """
    found = []
    for path in sorted(folder.glob(FULL_SIZE)):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            seconds = {
                name: statistics.median(sum(turn[name].values()) for turn in row["turns"])
                for name in row["turns"][0]
            }
            what = f"{row['pixels']}², {result['setting']['device']}"
            found.append((what, seconds["student"], seconds["teacher"]))
    return found


def claims(
    evaluations: list[dict],
    times: list[dict],
    measured: list[dict],
    sized: Sequence[tuple[str, float, float]] = (),
    shipped: Sequence[dict] = (),
) -> str:
    """What SD3.5-Flash claims, or FewStep sets out to reach, and whether these runs have it."""

    def scored(name: str, steps: int, encoders: str = PLAIN, recipe: str | None = None) -> dict:
        """Rows, by number of captions."""
        return {
            row["captions"]: row
            for row in evaluations
            if (row["name"], row["steps"], row["encoders"]) == (name, steps, encoders)
            and (row["cfg"] != 1) == (name in (TEACHER, EITHER))
            and "ratio" not in row
            and row.get("recipe") == recipe
        }

    def score(*args, **kwargs) -> dict:
        """Overall, by number of captions."""
        return {number: row["overall"] for number, row in scored(*args, **kwargs).items()}

    def clearly(above: str, below: str) -> tuple:
        """Two runs' scores in 4 steps on the same captions; what the first must exceed to be called
        better: the second by two standard errors of the difference.
        """
        one, other = scored(above, 4), scored(below, 4)
        most = max(one.keys() & other.keys(), default=None)
        if most is None:
            return None, None
        one, other = one[most], other[most]
        return one["overall"], other["overall"] + 2 * (error(one) ** 2 + error(other) ** 2) ** 0.5

    def ships(name: str, steps: int, scorer: str) -> dict:
        """Overall of a file, by number of captions."""
        wanted = name, steps, scorer
        return {
            row["captions"]: row["overall"]
            for row in shipped
            if (row["name"], row["steps"], row["scorer"]) == wanted
        }

    def beside(seen: dict, bar: dict, share: float = 1.0, less: float = 0.0) -> tuple:
        """Both on the same captions, as many as there are."""
        most = max(seen.keys() & bar.keys(), default=None)
        return seen.get(most), None if most is None else share * bar[most] - less

    def faster(claim: str, own: float | None, slow: float | None) -> tuple:
        """The claim that the student's seconds are as many times less than the teacher's."""
        return claim, own and slow and slow / own, FASTER, lambda a, b: a >= b, "times"

    def took(key: str) -> list[float | None]:
        """Student's and teacher's seconds, of what their rows have as `key`."""
        return [
            next((row.get(key) for row in times if row["name"] == name), None)
            for name in (STUDENT, TEACHER)
        ]

    def seeded() -> tuple[float | None, float | None]:
        """Mean of the seeds with timestep sharing; and what it must exceed to be called better:
        the other mean by two standard errors of the difference.
        """
        runs = sharing(evaluations)
        shared, fresh = ([r["overall"] for r in runs.get(how, [])] for how in ("shared", "random"))
        if min(len(shared), len(fresh)) < SEEDS:
            return None, None
        error = sum(statistics.variance(each) / len(each) for each in (shared, fresh)) ** 0.5
        return statistics.mean(shared), statistics.mean(fresh) + 2 * error

    def scale(how: str) -> float | None:
        found = [row["scale"] for row in measured if row["renoise"] == how]
        return statistics.median(found) if found else None

    student, t5 = score(STUDENT, 4), score(EITHER, 16, "no clip")
    six, sixteen = (score(STUDENT, 4, recipe=name) for name in ("flash-6", "flash-16"))
    best = student[max(student)] if student else None
    quick = f"{FASTER} times as fast as the teacher"
    holds: list[tuple[str, float | None, float | None, Callable[[float, float], bool], str]] = [
        (
            "4 steps, at least its teacher in 50 with CFG",
            *beside(student, score(TEACHER, 50)),
            _reaches,
            "%",
        ),
        *(
            (
                f"the same of the files that ship, seen by {scorer}",
                *beside(ships(SHIPPED_STUDENT, 4, scorer), ships(SHIPPED_TEACHER, 50, scorer)),
                _reaches,
                "%",
            )
            for scorer in dict.fromkeys(row["scorer"] for row in shipped)
        ),
        ("4 steps, at least 90 %", best, 0.9, _reaches, "%"),
        (
            "2 steps, at least 0.95 of 4 steps",
            *beside(score(STUDENT, 2), student, share=0.95),
            _reaches,
            "%",
        ),
        ("6 bits, within 1 point of 16", *beside(six, sixteen, less=0.01), _reaches, "%"),
        faster(f"{quick}, in seconds a picture", *took("seconds")),
        faster(f"{quick}, in seconds of sampling alone", *took("sampling")),
        *(
            faster(f"the same of models as large as SD3.5-Medium, a picture of {what}", *seconds)
            for what, *seconds in sized
        ),
        (
            "without T5, at most 5 points less than with it",
            *beside(student, score(STUDENT, 4, "both"), less=0.05),
            _reaches,
            "%",
        ),
        (
            "teacher by T5 alone, 16 steps, at most 5 points less than by CLIP-L alone",
            *beside(t5 or score(TEACHER, 16, "no clip"), score(TEACHER, 16), less=0.05),
            _reaches,
            "%",
        ),
        (
            "timestep sharing above random re-noising by two standard errors, mean of seeds",
            *seeded(),
            _above,
            "%",
        ),
        (
            "timestep sharing's gradient less noisy, in samples",
            scale("shared"),
            scale("random"),
            lambda a, b: a < b,
            "",
        ),
        (
            "distribution matching above none by two standard errors",
            *clearly("match", "trajectory-2"),
            _above,
            "%",
        ),
        (
            "split-timestep fine-tuning above none by two standard errors",
            *clearly(STUDENT, "match"),
            _above,
            "%",
        ),
    ]
    lines = [
        [what, "", "", "not measured"]
        if seen is None or bar is None
        else [what, _told(seen, unit), _told(bar, unit), "yes" if check(seen, bar) else "no"]
        for what, seen, bar, check, unit in holds
    ]
    return markdown(["claim", "here", "to reach", "reproduced"], lines)


def _reaches(seen: float, bar: float) -> bool:
    return round(seen, 4) >= round(bar, 4)


def _above(seen: float, bar: float) -> bool:
    return round(seen, 4) > round(bar, 4)


def _told(value: float, unit: str) -> str:
    if unit == "%":
        return f"{percent(value)} %"
    return f"{value:.1f} times" if unit == "times" else f"{value:.0f}"


def page(folder: Path) -> str:
    """The whole page. Raises: ValueError where no run of `folder` was scored."""
    if not (folder / EVALUATIONS).exists():
        raise ValueError(f"{folder} holds no {EVALUATIONS}: score a run first (eval)")
    evaluations, times = rows(folder / EVALUATIONS), rows(folder / TIMES)
    for row in evaluations:
        if lacking := [key for key in _SCORED if key not in row]:
            said = f"{folder / EVALUATIONS}: a line lacks {', '.join(lacking)}: delete it"
            raise ValueError(f"{said} ({json.dumps(row)[:80]})")
    measured, shipped = rows(folder / NOISE), rows(folder / SHIPPED)
    processors = sorted(
        {f"{t['processor']}, {t['threads']} threads" for t in times if "threads" in t}
    )
    on = f" Taken on {' and '.join(processors)}." if processors else ""
    return f"""# The miniature, distilled

`python -m distill table` makes this page from the runs' own logs. Shares in % of captions that were
kept from training, in GenEval's six categories and their mean (overall); right: everything at once,
the background too (`demo/categories.py`). A caption is asked about in one category, in two or in
three, so that their shares are often alike. Fréchet: distance to true scenes of the same captions
in features of the scene VAE; it falls as captions grow in number.

## What holds

{claims(evaluations, times, measured, full_size(folder), shipped)}

A picture is text, sampling and VAE, and only sampling is shortened. The miniature's VAE has four
times the arithmetic of a call of its model, SD3's about that of one call of SD3.5-Medium; what a
model of that size takes, its weights random, `python -m bench.distilled --out FOLDER` measures.

## Teacher and students

trajectory: stage 1, whose ways are straight and end at the right picture nearest to the teacher's
(`chords` and `mend` in `distill/trajectory.py`). trajectory-2: a second round, on ways of its own
that are mended anew: so a student can be better than its teacher. match: stage 2. split: stage 3,
merged. These two teach the four steps alone; two steps are what stage 1 has left of them. plain,
mended: a short stage 1 on the same trajectories, towards the teacher's own ends along its own ways
(the paper's regression), and towards right ones along straight ways.

Without T5's tokens. A picture: seconds through ComfyUI, text, sampling and VAE, one at a time, the
runs in turns (`python -m distill time`); sampling: those of them that depend on the steps.{on}

{scores(evaluations, times)}

## What ships

The files in `demo/models`, drawn by ComfyUI by CLIP-L alone (`python -m distill shipped`; the rows
above are of unquantised weights, drawn in plain torch). Two scorers that share no code see each
picture: by the outline that fits best (`demo/score.py`), by hue and radius (`demo/second_look.py`).
agree: the share of pictures that both call right, or both wrong.

{files(shipped)}

## Encoders

both: CLIP-L and T5; no t5, no clip: its tokens left out, as where it is not loaded; zero t5, zero
clip: zeros for what it says. The T5 is the last that was made for the teacher (align-2, then
either); students never saw it. The student's rows are of the file that ships, in 6 bits.

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
