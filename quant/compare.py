"""Two files, tensor by tensor: what the second costs against the first. And what one file holds."""

import json
import math
import os
from collections.abc import Callable

from .architectures import find_architecture, prefix_of
from .errors import GGUFError
from .measure import Errors
from .plan import named
from .reader import GGUFFile
from .report import Report, Row
from .sources import Source, is_gguf, open_source
from .stored import StoredTensor
from .threads import in_order

Progress = Callable[[int, int, str], None]
_SHOWN = 72  # characters of a metadata field


def compare(first: str, second: str, progress: Progress | None = None) -> Report:
    """The errors of `second` against `first`, by tensor name (prefixes of checkpoints aside).

    Raises: GGUFError where the two have no tensor in common, or a file is bad.
    """
    ours, theirs = (_inner(open_source(path)) for path in (first, second))
    common = [name for name in ours if name in theirs]
    if not common:
        raise GGUFError(f"{first} and {second} have no tensor's name in common: not the same model")
    report = Report(
        title=f"{second} against {first}",
        size=sum(theirs[name].nbytes for name in common),
        source_size=sum(ours[name].nbytes for name in common),
        architecture=find_architecture(ours).tag,
        notes=_missing(ours, theirs, first) + _missing(theirs, ours, second),
    )
    done, total = 0, sum(ours[name].numel for name in common)
    for name in common:
        a, b = ours[name], theirs[name]
        if a.shape == b.shape:
            report.rows.append(Row(name, a.shape, a.label, b.label, b.nbytes, _errors(a, b)))
        else:
            report.notes.append(f"{name}: shapes {a.shape} and {b.shape}: not compared")
        if report.rows and (bad := report.rows[-1].errors.nonfinite) and a.shape == b.shape:
            report.notes.append(f"{name}: {bad} places NaN or infinite: left out")
        done += a.numel
        if progress is not None:
            progress(done, total, name)
    return report


def inspect(path: str) -> Report:
    """What a file holds, without reading its tensors."""
    source = open_source(path)
    names = _inner(source)
    rows = [
        Row(name, tensor.shape, tensor.label, tensor.label, tensor.nbytes)
        for name, tensor in source.tensors.items()
    ]
    tag = source.architecture or find_architecture(names).tag
    size = sum(os.path.getsize(file) for file in source.files)
    return Report(title=f"{path}: {tag}", size=size, architecture=tag, rows=rows)


def fields_of(path: str) -> dict[str, object]:
    """All metadata of a file, as plain data."""
    if not is_gguf(path):
        return open_source(path).metadata
    with GGUFFile(path) as file:
        return dict(file.metadata)


def field_lines(fields: dict[str, object]) -> list[str]:
    """A line for each field; long values are cut short."""
    width = max(map(len, fields), default=0)
    return [f"{key:<{width}}  {_short(value)}" for key, value in fields.items()]


def _short(value: object) -> str:
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} values, {json.dumps(value[:3], ensure_ascii=False)[1:-1]}, …"
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _inner(source: Source) -> dict[str, StoredTensor]:
    return named(source, prefix_of(source.tensors))


def _missing(ours: dict, theirs: dict, path: str) -> list[str]:
    alone = [name for name in ours if name not in theirs]
    return [f"only in {path}: {len(alone)} tensors, {alone[0]} first"] if alone else []


def _errors(a: StoredTensor, b: StoredTensor) -> Errors:
    def compared(rows: tuple[int, int]) -> Errors:
        errors = Errors()
        errors.add(a.read(*rows), b.read(*rows))
        return errors

    whole = Errors()
    for part in in_order(compared, a.chunks(math.lcm(a.granule, b.granule))):
        whole.merge(part)
    return whole
