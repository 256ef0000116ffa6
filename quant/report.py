"""What a conversion or comparison found: for each tensor and for the file, as table and as JSON."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from .measure import Errors

WORST = 10  # tensors of largest relative error, named at the end


@dataclass(frozen=True)
class Row:
    """A tensor: its type and what it cost. nbytes: stored. errors: None where not measured."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    qtype: str
    nbytes: int
    errors: Errors | None = None
    why: str = ""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def as_dict(self) -> dict[str, object]:
        entry = {
            "name": self.name,
            "shape": list(self.shape),
            "source_type": self.source_type,
            "type": self.qtype,
            "bytes": self.nbytes,
            "bits_per_weight": round(self.bits, 4),
        }
        if self.why:
            entry["why"] = self.why
        return entry | _measures(self.errors)


@dataclass
class Report:
    """title: what was done to what. size: the file's in bytes. notes: lines for the person."""

    title: str
    size: int
    architecture: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source_size: int = 0
    seconds: float | None = None

    @property
    def weights(self) -> int:
        return sum(row.weights for row in self.rows)

    @property
    def bits(self) -> float:
        """Bits a weight, over all tensors."""
        return 8 * sum(row.nbytes for row in self.rows) / self.weights if self.weights else 0.0

    @property
    def total(self) -> Errors:
        """Over all weights measured."""
        total = Errors()
        for row in self.rows:
            if row.errors is not None:
                total.merge(row.errors)
        return total

    @property
    def worst(self) -> list[Row]:
        """The measured tensors of largest relative error, at most `WORST`, none of them exact."""
        measured = [row for row in self.rows if row.errors and row.errors.squared_error]
        return sorted(measured, key=lambda row: -row.errors.relative)[:WORST]

    def as_dict(self) -> dict[str, object]:
        """Plain data for json.dumps."""
        report = {
            "title": self.title,
            "architecture": self.architecture,
            "size": self.size,
            "source_size": self.source_size,
            "weights": self.weights,
            "bits_per_weight": round(self.bits, 4),
            **_measures(self.total if self.total.count else None),
            "types": _by_type(self.rows),
            "worst": [row.name for row in self.worst],
            "notes": self.notes,
            "tensors": [row.as_dict() for row in self.rows],
        }
        return report if self.seconds is None else report | {"seconds": round(self.seconds, 2)}

    def text(self, every_tensor: bool = False, summary_first: bool = False) -> str:
        """The report to read; `every_tensor`: with a line for each. The summary stands at the end,
        where a terminal stops, or below the title, where a box that scrolls begins."""
        lines = [self.title, self.summary()] if summary_first else [self.title]
        if every_tensor:
            lines += ["", *_table(self.rows)]
        lines += ["", *_type_table(self.rows), ""]
        if self.worst and not every_tensor:
            lines += [f"largest relative errors (of {len(self.rows)} tensors):"]
            lines += [*_table(self.worst), ""]
        lines += self.notes if summary_first else [*self.notes, self.summary()]
        return "\n".join(map(_printable, lines)).rstrip()

    def summary(self) -> str:
        """One line: '1.91 GB (source 5.11 GB), 6.59 bits a weight, relative error 0.0031, …'"""
        was = f" (source {size_text(self.source_size)})" if self.source_size else ""
        parts = [f"{size_text(self.size)}{was}", f"{self.bits:.2f} bits a weight"]
        total = self.total
        if total.count:
            parts += [
                f"relative error {total.relative:.3g}",
                f"RMSE {total.rmse:.3g}",
                f"cosine {total.cosine:.6f}",
            ]
        if self.seconds is not None:
            parts.append(f"{self.seconds:.1f} s")
        return ", ".join(parts)


def size_text(size: float) -> str:
    """Bytes for people: '1.91 GB'."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.2f} GB"


def _printable(line: str) -> str:
    """One line that leaves a terminal as it is, whatever a file calls its tensors."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _measures(errors: Errors | None) -> dict[str, float | None]:
    if errors is None:
        return {}
    values = {"rmse": errors.rmse, "relative_error": errors.relative, "cosine": errors.cosine,
              "largest_error": errors.largest}  # fmt: skip
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _by_type(rows: Iterable[Row]) -> list[dict[str, object]]:
    """One entry a type, the largest share first."""
    groups = groupby(sorted(rows, key=lambda row: row.qtype), key=lambda row: row.qtype)
    entries = []
    for qtype, members in groups:
        members = list(members)
        total = Errors()
        for row in members:
            total.merge(row.errors or Errors())
        weights, size = sum(r.weights for r in members), sum(r.nbytes for r in members)
        entries.append(
            {
                "type": qtype,
                "tensors": len(members),
                "weights": weights,
                "bytes": size,
                "bits_per_weight": round(8 * size / weights, 4) if weights else 0.0,
                **_measures(total if total.count else None),
            }
        )
    return sorted(entries, key=lambda entry: -entry["bytes"])


def _type_table(rows: Iterable[Row]) -> list[str]:
    entries = _by_type(rows)
    lines = [("type", "tensors", "weights", "size", "bits", "RMSE", "relative", "cosine")]
    for entry in entries:
        lines.append(
            (
                entry["type"],
                str(entry["tensors"]),
                f"{entry['weights']:,}",
                size_text(entry["bytes"]),
                f"{entry['bits_per_weight']:.3g}",
                *_columns(entry),
            )
        )
    return _aligned(lines, left=1)


def _table(rows: Iterable[Row]) -> list[str]:
    lines = [("tensor", "from", "type", "shape", "bits", "RMSE", "relative", "cosine", "")]
    for row in rows:
        shape = "×".join(map(str, row.shape)) or "scalar"
        measured = _columns(_measures(row.errors))
        lines.append((row.name, row.source_type, row.qtype, shape, f"{row.bits:.3g}", *measured,
                      row.why))  # fmt: skip
    return _aligned(lines, left=4)


def _columns(entry: dict[str, object]) -> tuple[str, str, str]:
    if "rmse" not in entry:
        return "", "", ""
    relative = entry["relative_error"]
    return (
        f"{entry['rmse']:.3g}",
        "inf" if relative is None else f"{relative:.3g}",
        f"{entry['cosine']:.6f}",
    )


def _aligned(lines: list[tuple[str, ...]], left: int) -> list[str]:
    """Columns side by side, empty ones left out; the first `left` and the last to the left."""
    columns = [c for c in zip(*lines, strict=True) if any(c[1:])]
    widths = [max(map(len, column)) for column in columns]
    text = []
    for cells in zip(*columns, strict=True):
        padded = [
            cell.ljust(width) if i < left or not columns[i][0] else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        text.append("  ".join(padded).rstrip())
    return text
