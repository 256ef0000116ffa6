"""A preset inside a checkpoint: the GGUF keys `fewstep.*`.

| Key | Type | Meaning |
|---|---|---|
| fewstep.version | u32 | 1 |
| fewstep.name, .label, .rule, .t5, .formula, .note, .sure, .source | string | fields of Preset |
| fewstep.cfg, .shift, .expert_boundary | f32 | fields of Preset |
| fewstep.steps | u32 | the default |
| fewstep.sigmas.<n> | array of f32 | n+1 sigmas for n steps |
| fewstep.latent_sides.<n> | array of u32 | n latent sides for n steps |

version, name, rule, steps and a row of sigmas (or `formula` with `shift`) are required; the others
have Preset's defaults. Keys `fewstep.*` that are not listed here are left to others.
"""

from collections.abc import Iterable

from .presets import Preset
from .schedules import FORMULAS

VERSION = 1
PREFIX = "fewstep."
TEXTS = ("name", "label", "rule", "t5", "formula", "note", "sure", "source")
FLOATS = ("cfg", "shift", "expert_boundary")


def preset_to_metadata(preset):
    """The `fewstep.*` keys of a preset, as a dict of int, float, str and lists.

    A preset that is only a formula also gets the row of its default steps written out, so that
    other readers need no formula; FLUX.2's, which depends on the picture's size, does not.
    """
    metadata = {PREFIX + "version": VERSION, PREFIX + "steps": preset.steps}
    for field in (*TEXTS, *FLOATS):
        value = getattr(preset, field)
        if value not in (None, ""):
            metadata[PREFIX + field] = value
    rows = preset.rows
    if not rows and preset.formula in FORMULAS:
        rows = (preset.sigmas().tolist(),)
    metadata.update({f"{PREFIX}sigmas.{len(row) - 1}": list(row) for row in rows})
    sides = {f"{PREFIX}latent_sides.{len(row)}": list(row) for row in preset.latent_sides}
    return {**metadata, **sides}


def without_preset(metadata):
    """Metadata without any preset's keys; what else begins with `fewstep.` stays."""
    own = {PREFIX + field for field in ("version", "steps", *TEXTS, *FLOATS)}
    rows = tuple(f"{PREFIX}{field}." for field in ("sigmas", "latent_sides"))
    return {k: v for k, v in metadata.items() if k not in own and not k.startswith(rows)}


def preset_from_metadata(metadata):
    """The Preset in a mapping of GGUF metadata, or None if it has no `fewstep.version`.

    Raises ValueError naming the key, what came and what was expected.
    """
    version = metadata.get(PREFIX + "version")
    if version is None:
        return None
    if version != VERSION:
        raise ValueError(
            f"{PREFIX}version is {version!r}; this FewStep reads {VERSION}. Update FewStep, or "
            f"choose a preset by hand."
        )
    fields = {field: typed(metadata, field, str) for field in TEXTS}
    fields |= {field: typed(metadata, field, float) for field in FLOATS}
    fields["steps"] = typed(metadata, "steps", int)
    for field in ("name", "rule", "steps"):
        if fields[field] is None:
            raise ValueError(f"{PREFIX}{field} is missing. Write the checkpoint again with it.")
    given = {field: value for field, value in fields.items() if value is not None}
    given.setdefault("label", given["name"])
    rows = numbered(metadata, "sigmas", extra=1)
    try:
        return Preset(**given, rows=rows, latent_sides=numbered(metadata, "latent_sides", extra=0))
    except ValueError as error:
        raise ValueError(f"the keys {PREFIX}*: {error}") from None


def typed(metadata, field, kind):
    """The value of a key as `kind`, None if it is missing. Raises ValueError."""
    value = metadata.get(PREFIX + field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError(f"{PREFIX}{field} is {value!r}: expected {kind.__name__}.")
    return value


def numbered(metadata, field, extra):
    """The rows under `fewstep.<field>.<n>`, each of n + `extra` numbers. Raises ValueError."""
    rows = []
    for key in metadata:
        if not key.startswith(f"{PREFIX}{field}."):
            continue
        count = key.rpartition(".")[2]
        row = numbers(metadata[key])
        if not count.isdecimal() or row is None or len(row) != int(count) + extra:
            raise ValueError(
                f"{key} is {metadata[key]!r}: expected n{'+1' * extra} numbers, n as in the key."
            )
        rows.append(row)
    return tuple(rows)


def numbers(array):
    """A metadata array as a tuple of numbers, None if it is anything else."""
    row = () if isinstance(array, str) or not isinstance(array, Iterable) else tuple(array)
    return row if all(isinstance(number, (int, float)) for number in row) else None
