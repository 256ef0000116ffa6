"""What the runs of a folder have logged, read again.

Of several lines that measure the same thing the last one counts.
"""

import json
import statistics
from collections import defaultdict
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
PLAIN = "no t5"  # the encoders with which runs are compared
_SAME = (
    "name", "steps", "cfg", "encoders", "captions", "ratio", "recipe", "renoise", "sigma", "scorer",
    "pictures", "processor", "threads",
)  # fmt: skip
_SHARES = (*CATEGORIES, "overall", "right")
_WRITTEN = {  # in each line: texts and numbers
    EVALUATIONS: (("name", "encoders"), ("steps", "cfg", "captions", *_SHARES, "frechet")),
    NOISE: (("name", "renoise"), ("sigma", "scale", "batches")),
    TIMES: (("name",), ("seconds",)),
    SHIPPED: (
        ("name", "sha256", "scorer"), ("steps", "cfg", "captions", *_SHARES, "agree")
    ),
}  # fmt: skip
_TIMED = {"processor", "threads", "sampling"}  # which an older line of times lacks
_TRAINED = {"trained", "renoise", "seed"}


def rows(path: Path) -> list[dict]:
    """The lines of a JSON Lines file; none if there is no file. Raises: ValueError naming a line
    that is no object, or lacks what a log of that name has.
    """
    if not path.exists():
        return []
    texts, numbers = _WRITTEN.get(path.name, ((), ()))
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, is no JSON object: delete the line"
            ) from error
        lacking = [key for key in texts if not isinstance(row.get(key), str)]
        lacking += [key for key in numbers if not isinstance(row.get(key), int | float)]
        if lacking:
            told = f"{path}, line {number}, lacks {', '.join(lacking)}: delete the line"
            raise ValueError(f"{told} ({json.dumps(row)[:80]})")
        lines.append(row)
    return list({tuple(row.get(key) for key in _SAME): row for row in lines}.values())


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
            what = f"a picture of {row['pixels']}², {result['setting']['device']}"
            found.append((what, seconds["student"], seconds["teacher"]))
    return found


def timed(times: list[dict], fast: str, slow: str) -> list[tuple[dict, dict]]:
    """`fast`'s row and `slow`'s, for each processor, threads and number of pictures drawn at once
    with which both were timed.
    """
    groups = defaultdict(dict)
    for row in times:
        if row.keys() >= _TIMED:
            groups[row["processor"], row["threads"], row.get("pictures", 1)][row["name"]] = row
    both = [group for _, group in sorted(groups.items()) if {fast, slow} <= group.keys()]
    return [(group[fast], group[slow]) for group in both]


def setting(row: dict) -> list[str]:
    """Of a row of times: '8 pictures at once', 'x86_64 AVX2', '2 threads'."""
    number, threads = row.get("pictures", 1), row["threads"]
    drawn = f"{number} pictures at once" if number > 1 else "a picture at a time"
    return [drawn, row["processor"], f"{threads} thread{'s' * (threads > 1)}"]


def sharing(evaluations: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in re-noising and seed alone, by re-noising: "shared" and "random"."""
    groups = defaultdict(lambda: defaultdict(dict))
    for row in evaluations:
        matched = row.get("stage") == "match" and row.keys() >= _TRAINED
        if matched and row["encoders"] == PLAIN and "recipe" not in row:
            alike = row["trained"], row["steps"], row["captions"]
            groups[alike][row["renoise"]][row["seed"]] = row
    both = [group for group in groups.values() if len(group) > 1]
    chosen = max(both, key=lambda group: sum(map(len, group.values())), default={})
    return {how: list(chosen[how].values()) for how in sorted(chosen, reverse=True)}


def error(row: dict) -> float:
    """Standard error of a row's "overall", as if a caption were right in all its categories or in
    none: each share is a binomial one.
    """
    variance = 0.0
    for names in ALIKE:
        share, weight = statistics.mean(row[name] for name in names), len(names) / len(CATEGORIES)
        variance += weight**2 * share * (1 - share) / (row["captions"] / len(ALIKE))
    return variance**0.5
