"""A user's own presets: rows of a JSON file, no code to touch.

    {"my-turbo": {"label": "My turbo", "sigmas": [[1, 0.9, 0.75, 0.5, 0]], "shift": 3}}

Keys are the fields of `Preset`, with `sigmas` for its rows; only `sigmas`, or a `formula` with its
`shift`, is required.
"""

import json

from .errors import one_of
from .presets import Preset

KINDS = {
    **dict.fromkeys(("label", "formula", "rule", "t5", "note", "sure", "source"), str),
    **dict.fromkeys(("shift", "cfg", "expert_boundary"), float),
    "steps": int,
}


def load_user_presets(path, taken=()):
    """The presets in the JSON file `path` (a Path), as a tuple; none if there is no such file.

    `taken` holds names that are in use already. Raises ValueError naming the file, the row, the
    field, what came and the remedy.
    """
    if not path.exists():
        return ()
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin files with a mark
        rows = json.loads(text, object_pairs_hook=without_twins)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, a twin
        raise ValueError(f"{path}: {error}. Correct the JSON there.") from None
    if not isinstance(rows, dict):
        raise ValueError(f'{path}: expected {{"name": {{…}}, …}}, found {type(rows).__name__}.')
    presets = []
    for name, row in rows.items():
        try:
            if name in taken:
                raise ValueError("a built-in preset has this name: choose another.")
            presets.append(preset_from_row(name, row))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: preset {name!r}: {error}") from None
    return tuple(presets)


def preset_from_row(name, row):
    """The Preset of one JSON object. Raises ValueError naming the field."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object of fields, found {row!r}.")
    scalars = {key: value for key, value in row.items() if key not in ("sigmas", "latent_sides")}
    for key, value in scalars.items():
        check_field(key, value)
    sigmas = number_rows("sigmas", row.get("sigmas", []))
    defaults = {"label": name, "source": "the user", "steps": len(sigmas[0]) - 1 if sigmas else 4}
    sides = number_rows("latent_sides", row.get("latent_sides", []))
    return Preset(name, **{**defaults, **scalars}, rows=sigmas, latent_sides=sides)


def check_field(key, value):
    """Raise ValueError unless `key` is a field and `value` of its type (an int is a float too)."""
    kind = KINDS[one_of(key, [*KINDS, "sigmas", "latent_sides"], "field")]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{key} is {value!r}: write a value of type {kind.__name__}.")


def number_rows(key, rows):
    """A list of lists of numbers, as tuples. Raises ValueError."""
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and all(type(number) in (int, float) for number in row)
        for row in rows
    ):
        raise ValueError(f"{key} is {rows!r}: write a list of rows, such as [[1, 0.75, 0]].")
    return tuple(map(tuple, rows))


def without_twins(pairs):
    """A JSON object as a dict. Raises ValueError if a key comes twice."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} appears twice")
    return dict(pairs)
