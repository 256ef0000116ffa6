"""What SD3.5-Flash claims, or FewStep sets out to reach, and whether a folder's runs have it."""

import statistics
from collections.abc import Callable, Sequence

from .logs import PLAIN, error, setting, sharing, timed

TEACHER, STUDENT = "teacher", "split"  # runs that the paper's claims are about
UNMENDED = "plain-match"  # stages 1 and 2 as the paper has them
EITHER = "either"  # the teacher with a T5 that is enough alone; once adopted it is TEACHER
SHIPPED_STUDENT, SHIPPED_TEACHER = "fewstep-demo.gguf", "fewstep-teacher.gguf"
FASTER = 18  # times, than the teacher
SEEDS = 3  # of either way of re-noising, before one is called better


def claims(
    evaluations: list[dict],
    times: list[dict],
    measured: list[dict],
    sized: Sequence[tuple[str, float, float]] = (),
    shipped: Sequence[dict] = (),
) -> list[list[str]]:
    """Claim, what was seen, what was to be reached, and whether it was, a line for each."""

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
    took = [
        (", ".join([quick, *setting(own)]), own["seconds"], slow["seconds"])
        for own, slow in timed(times, STUDENT, TEACHER)
    ]
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
        (
            "4 steps of the paper's stages 1 and 2, nothing mended, at least the teacher in 50",
            *beside(score(UNMENDED, 4), score(TEACHER, 50)),
            _reaches,
            "%",
        ),
        ("4 steps, at least 90 %", best, 0.9, _reaches, "%"),
        (
            "2 steps, at least 0.95 of 4 steps",
            *beside(score(STUDENT, 2), student, share=0.95),
            _reaches,
            "%",
        ),
        ("6 bits, within 1 point of 16", *beside(six, sixteen, less=0.01), _reaches, "%"),
        *(faster(*each) for each in took or [(quick, None, None)]),
        *(
            faster(f"{quick}, of models as large as SD3.5-Medium, {what}", *seconds)
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
    return [
        [what, "", "", "not measured"]
        if seen is None or bar is None
        else [what, _told(seen, unit), _told(bar, unit), "yes" if check(seen, bar) else "no"]
        for what, seen, bar, check, unit in holds
    ]


def _reaches(seen: float, bar: float) -> bool:
    return round(seen, 4) >= round(bar, 4)


def _above(seen: float, bar: float) -> bool:
    return round(seen, 4) > round(bar, 4)


def _told(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.1f} times" if unit == "times" else f"{value:.0f}"
