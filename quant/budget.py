"""A size budget: the mix of types with the least error in all that fits into so many bytes.

Every ordinary matrix is packed in each type of a ladder, on a sample of its rows, and its squared
error taken, weighted by the importance of its columns where that is known. Then all begin at their
smallest type, and the step that saves the most error for its bytes is taken as long as one fits.
Steps go along the lower convex hull of each matrix's (bytes, error), which puts this greedy choice
within one step of the best there is (Lagrange multipliers; Shoham and Gersho 1988).
"""

import heapq
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor

from .dequant import dequantize
from .errors import GGUFError
from .plan import Choice, Plan
from .quantize import quantize, writable_types
from .report import size_text
from .types import PLAIN_TYPES

LADDER = (T.Q2_K, T.Q3_K, T.Q4_0, T.Q4_K, T.Q5_0, T.Q5_K, T.Q6_K, T.Q8_0)
SAMPLE = 2**18  # weights of a tensor that are measured, in runs of rows spread over it
_RUNS = 8
_WORST = 1e300  # a squared error
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Point = tuple[int, float, T]  # bytes, squared error, type
Progress = Callable[[int, int, str], None]


def parse_budget(text: str) -> Callable[[Plan], int]:
    """'1.8GB', '900 MiB' or '4.5bpw' (bits a weight) -> plan -> bytes of tensors.

    Raises: GGUFError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    unit = match[2].upper() if match else "?"
    if match is None or unit not in {*_UNITS, "BPW"} or not float(match[1]):
        raise GGUFError(
            f"{text!r} is no budget: give a size, as 1.8GB, or bits a weight, as 4.5bpw"
        )
    number = min(float(match[1]), 1e15)  # infinity is no number of bytes
    if unit == "BPW":
        return lambda plan: int(number * sum(c.source.numel for c in plan.choices) / 8)
    return lambda plan: int(number * _UNITS[unit])


def fit(
    plan: Plan,
    budget: int,
    importance: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """`plan` with its ordinary matrices' types chosen anew, all tensors within `budget` bytes.

    Raises: GGUFError where even the smallest types take more, with the size that they take.
    """
    free = [choice for choice in plan.choices if choice.free]
    fixed = sum(choice.nbytes for choice in plan.choices if not choice.free)
    least = fixed + sum(_least(choice) for choice in free)
    if least > budget:
        raise GGUFError(
            f"{plan.source.path}: a budget of {size_text(budget)} is too small: the smallest types "
            f"take {size_text(least)}, {size_text(fixed)} of it in tensors that are kept"
        )
    hulls = {}
    for done, choice in enumerate(free):
        weight = (importance or {}).get(choice.name)
        hulls[choice.name] = hull(_measure(choice, weight))
        if progress is not None:
            progress(done + 1, len(free), f"measuring {choice.name}")
    taken = spend(hulls, budget - least)
    choices = tuple(
        replace(choice, qtype=hulls[choice.name][taken[choice.name]][2], why="by budget")
        if choice.name in hulls
        else choice
        for choice in plan.choices
    )
    return replace(plan, choices=choices)


def hull(points: list[Point]) -> list[Point]:
    """The lower convex hull, from the smallest on: each step saves less error a byte."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if best and point[1] >= best[-1][1]:
            continue
        while len(best) > 1 and _slope(best[-1], point) >= _slope(best[-2], best[-1]):
            best.pop()
        best.append(point)
    return best


def spend(hulls: Mapping[str, list[Point]], spare: int) -> dict[str, int]:
    """name -> which point of its hull, all steps together taking at most `spare` bytes."""
    taken = dict.fromkeys(hulls, 0)
    steps = [(-_slope(*points[:2]), name) for name, points in hulls.items() if len(points) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        points, at = hulls[name], taken[name]
        cost = points[at + 1][0] - points[at][0]
        if cost > spare:
            continue  # this one stays; cheaper steps of others may still fit
        spare -= cost
        taken[name] = at + 1
        if at + 2 < len(points):
            heapq.heappush(steps, (-_slope(points[at + 1], points[at + 2]), name))
    return taken


def _slope(first: Point, second: Point) -> float:
    """Error saved for each byte more."""
    return (first[1] - second[1]) / max(1, second[0] - first[0])


def _measure(choice: Choice, weight: Tensor | None) -> list[Point]:
    """The point of each type that the matrix can have."""
    source = choice.source
    x = _sample(choice).nan_to_num(0.0, 0.0, 0.0)  # which `convert` refuses, or writes so
    scale = source.numel / max(1, x.numel())
    points = []
    for qtype in _candidates(choice):
        if qtype is source.qtype or qtype in PLAIN_TYPES:
            y = x if qtype is source.qtype else x.to(PLAIN_TYPES[qtype]).float()
        else:
            y = dequantize(quantize(x, qtype, weight), qtype, tuple(x.shape))
        squares = (x - y).double().square()
        error = float((squares if weight is None else squares * weight.double()).sum()) * scale
        error = error if error < _WORST else _WORST  # NaN: weights too large for the type
        points.append((replace(choice, qtype=qtype).nbytes, error, qtype))
    return points


def _least(choice: Choice) -> int:
    """Bytes in the smallest type that the matrix can have."""
    return min(replace(choice, qtype=qtype).nbytes for qtype in _candidates(choice))


def _candidates(choice: Choice) -> list[T]:
    """Types of the ladder whose blocks divide the rows, none larger than the source's own."""
    source, writable = choice.source, writable_types()
    fitting = [qtype for qtype in LADDER if qtype in writable]
    fitting = [qtype for qtype in fitting if source.cols % GGML_QUANT_SIZES[qtype][0] == 0]
    if source.qtype is None or source.qtype in PLAIN_TYPES:
        return [*fitting, T.BF16 if source.label.startswith("BF16") else T.F16]
    size, width = GGML_QUANT_SIZES[source.qtype]
    smaller = [q for q in fitting if GGML_QUANT_SIZES[q][1] * size < width * GGML_QUANT_SIZES[q][0]]
    return [*smaller, source.qtype]


def _sample(choice: Choice) -> Tensor:
    """(rows, cols) float32: runs of rows spread evenly, about `SAMPLE` weights."""
    source = choice.source
    rows = max(1, SAMPLE // max(1, source.cols))
    if rows >= source.rows:
        return source.read(0, source.rows)
    grain = source.granule
    run = max(1, rows // _RUNS // grain) * grain
    starts = [(source.rows - run) * i // (_RUNS - 1) // grain * grain for i in range(_RUNS)]
    return torch.cat([source.read(start, start + run) for start in starts])
