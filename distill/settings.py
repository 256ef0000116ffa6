"""Settings from a JSON file or a command line: each of the right kind and within its bounds."""

import math
import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

WHOLE = """batch samples steps warmup full_every short_context proxy_steps batches trajectories
    teacher_steps depth text_width text_layers text_heads t5_layers t5_heads t5_head_width
    t5_feed_forward"""
COUNTS = "rank t5_pieces proxy_warmup decay guidance adversarial random_shift last_sigma"
RATES = "muon_rate adam_rate proxy_rate head_rate rate"
SHARES = "ema ida restart full_from unknown_token empty_prompt drop_clip drop_t5 omit_t5"
TINY = 5e-324  # the least number above 0
# name -> the least and the most that it may be
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(WHOLE.split(), (1, math.inf)),
    **dict.fromkeys(COUNTS.split(), (0, math.inf)),
    **dict.fromkeys(RATES.split(), (0, 1)),
    **dict.fromkeys(SHARES.split(), (0, 1)),
    **dict.fromkeys(("clip", "shift"), (TINY, math.inf)),
    "plateau": (0, 0.999),
    "seed": (0, 2**31 - 1),
}


def check_settings(
    kind: type, given: dict[str, Any], where: str = "", others: Sequence[str] = ()
) -> dict[str, Any]:
    """`given` as fields of the dataclass `kind`, lists as tuples, whole numbers as floats where
    those are meant. `others` are names that may stand beside them.

    Raises: ValueError naming the setting, and what is expected of it.
    """
    hints = get_type_hints(kind)
    known = sorted(field.name for field in fields(kind))
    checked = {}
    for name, value in given.items():
        if name not in known:
            there = ", ".join(sorted({*known, *others}))
            raise ValueError(f"{where}there is no setting {name}. There are {there}")
        fitting = _fitting(value, hints[name])
        if fitting is None or not _within(name, fitting[0]):
            raise ValueError(f"{where}{name} is {value!r}: expected {_expected(name, hints[name])}")
        checked[name] = fitting[0]
    return checked


def _fitting(value: Any, hint: Any) -> tuple[Any] | None:
    """The value as it is kept, in a tuple of one; None if it is of another kind."""
    if isinstance(hint, types.UnionType):
        found = (_fitting(value, one) for one in get_args(hint))
        return next((one for one in found if one is not None), None)
    if hint is types.NoneType:
        return (None,) if value is None else None
    if hint is float and type(value) in (int, float):
        return (float(value),) if math.isfinite(value) else None
    if hint in (int, bool, str):
        return (value,) if type(value) is hint else None
    if isinstance(value, list | tuple) and (parts := get_args(hint)):
        wanted = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(wanted) != len(value):
            return None
        fitting = [_fitting(one, part) for one, part in zip(value, wanted, strict=True)]
        return None if None in fitting else (tuple(one for (one,) in fitting),)
    return None


def _within(name: str, value: Any) -> bool:
    low, high = BOUNDS.get(name, (-math.inf, math.inf))
    return not isinstance(value, int | float) or low <= value <= high


def _expected(name: str, hint: Any) -> str:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if isinstance(hint, types.UnionType):
        parts = [one for one in get_args(hint) if one is not types.NoneType]
        return " or ".join([*(_expected(name, one) for one in parts), "null"])
    if hint not in kinds:
        parts = get_args(hint)
        many = "" if parts[-1] is ... else f"{len(parts)} "
        return f"a list of {many}{'texts' if parts[0] is str else 'numbers'}"
    low, high = BOUNDS.get(name, (None, None))
    if low is None or hint is bool:
        return kinds[hint]
    if high == math.inf:
        return f"{kinds[hint]} {'above 0' if low == TINY else f'from {low} on'}"
    return f"{kinds[hint]} from {low} to {high}"
