"""Carry out a plan: read, check, pack and write one tensor after another, a few rows at a time."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor

from .codebook import NEED_IMPORTANCE
from .dequant import dequantize
from .effort import EFFORTS
from .errors import GGUFError
from .measure import Errors, all_finite
from .plan import Choice, Plan
from .quantize import quantize
from .report import Report, Row, size_text
from .threads import in_order
from .types import PLAIN_TYPES
from .writer import NamedTensor, write_gguf

Progress = Callable[[int, int, str], None]  # weights done, weights in all, the tensor at work
_SAFE = 65504.0  # weights up to the largest half give no block a scale that is none
_HEADER_ROOM = 2**20  # bytes kept free besides the tensors and the fields


@dataclass(frozen=True)
class Options:
    """measure: compare what is written with the source.

    importance: new name -> (cols,) float32, and effort: see `quantize`. started: when the work
    that the report times began; make the options before `fit`, and its measuring counts.
    """

    allow_nonfinite: bool = False
    measure: bool = True
    progress: Progress | None = None
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    effort: str = EFFORTS[0]
    started: float = field(default_factory=time.monotonic)


def convert(
    plan: Plan,
    destination: str | os.PathLike[str],
    metadata: Mapping[str, object] | None = None,
    options: Options | None = None,
) -> Report:
    """Write `destination` after `plan`; the report of what that cost.

    The old file of that name stays until the new one is whole. `metadata` goes before the source's.

    Raises: GGUFError, before any work, for a destination that is the source, cannot be written or
    does not fit on the disk; and, leaving nothing behind, for NaN or infinity in a weight.
    """
    options = options or Options()
    path = Path(destination)
    check_destination(plan, path)
    check_importance(plan, options.importance)
    rows: dict[str, Row] = {}
    kind = {"general.type": plan.architecture.kind} if plan.architecture.kind else {}
    fields = {**plan.source.metadata, **kind, **(metadata or {})}
    fields["general.file_type"] = int(plan.file_type)
    work = _Work(plan, options, rows)
    write_gguf(path, plan.architecture.tag, fields, work.tensors())
    return Report(
        title=f"{path}: {plan.architecture.about} by {plan.recipe.name}, from {plan.source.path}",
        size=path.stat().st_size,
        architecture=plan.architecture.tag,
        rows=list(rows.values()),
        notes=[*plan.notes, *_nothing_new(plan), *work.notes],
        source_size=sum(choice.source.nbytes for choice in plan.choices),
        seconds=time.monotonic() - options.started,
    )


def _nothing_new(plan: Plan) -> list[str]:
    decided = [c for c in plan.choices if c.free or c.why.startswith("asked for")]
    if not decided or not all(map(_copied, decided)):
        return []
    return ["nothing was quantised: the source's matrices have these types already, or smaller"]


def check_destination(plan: Plan, path: Path, size: int | None = None) -> None:
    """Raises: GGUFError if the plan cannot be written to `path`, told without writing.

    size: of all tensors in bytes, None for the plan's.
    """
    folder = path.parent
    if os.path.isdir(path):
        raise GGUFError(f"{path}: a folder: name a file in it")
    if not os.path.isdir(folder):
        raise GGUFError(f"{path}: there is no folder {folder}: make it first")
    for source in plan.source.files:
        if os.path.exists(path) and os.path.samefile(path, source):
            raise GGUFError(f"{path}: is the source itself: choose another name")
    if path.suffix.lower() != ".gguf" or (os.path.exists(path) and not os.path.isfile(path)):
        raise GGUFError(f"{path}: not a .gguf file: name one, since loaders go by that ending")
    if not os.access(folder, os.W_OK) or (os.path.exists(path) and not os.access(path, os.W_OK)):
        raise GGUFError(f"{path}: cannot be written: change its permissions, or the folder's")
    needed = _HEADER_ROOM + (plan.nbytes if size is None else size)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise GGUFError(
            f"{path}: takes {size_text(needed)}, but only {size_text(free)} are free there: make "
            "room (an old file of that name is replaced only at the end), or write elsewhere"
        )


def check_importance(plan: Plan, importance: Mapping[str, Tensor]) -> None:
    """Raises: GGUFError for one that fits no tensor of the plan, has another length, or lacks."""
    for choice in plan.choices:
        copied = choice.source.qtype == choice.qtype
        if choice.qtype in NEED_IMPORTANCE and choice.name not in importance and not copied:
            raise GGUFError(
                f"{plan.source.path}: tensor {choice.name!r} is to become {choice.qtype.name}, "
                "which needs an importance, as in ggml: give one that has it, or choose another"
            )
    columns = {choice.name: choice.source.cols for choice in plan.choices}
    if importance and not columns.keys() & importance.keys():
        raise GGUFError(
            f"{plan.source.path}: the importance file names none of its tensors "
            f"(but {min(importance)}): it was gathered from another model"
        )
    for name in columns:  # in the file's order, so that the same tensor is named each time
        if name in importance and importance[name].numel() != columns[name]:
            raise GGUFError(
                f"{plan.source.path}: tensor {name!r} has rows of {columns[name]}, the importance "
                f"file {importance[name].numel()}: it was gathered from another model"
            )


class _Work:
    """Makes the blocks of each tensor when the writer asks for them."""

    def __init__(self, plan: Plan, options: Options, rows: dict[str, Row]):
        self.plan, self.options, self.rows = plan, options, rows
        self.notes: list[str] = []
        self.bad: dict[str, list[tuple[int, int]]] = {}  # (first row, weights) of NaN and infinity
        self.done, self.total = 0, sum(choice.source.numel for choice in plan.choices)

    def tensors(self) -> Iterator[NamedTensor]:
        for choice in self.plan.choices:
            blocks = self._maker(choice)
            yield choice.name, (blocks, choice.qtype, choice.source.shape)

    def _maker(self, choice: Choice) -> Callable[[], Tensor]:
        return lambda: self._make(choice)

    def _make(self, choice: Choice) -> Tensor:
        """(nbytes,) uint8"""
        source = choice.source
        out = torch.empty(choice.nbytes, dtype=torch.uint8)
        measured = self.options.measure and _is_float(choice.qtype)
        errors = Errors() if measured else None
        pack = partial(self._pack, choice, out, measured)
        chunks = source.chunks()
        for (start, stop), part in zip(chunks, in_order(pack, chunks), strict=True):
            if errors is not None:
                errors.merge(part)
            self.done += (stop - start) * source.cols
            if self.options.progress is not None:
                self.options.progress(self.done, self.total, choice.name)
        if bad := self.bad.get(choice.name):
            kept = "kept" if choice.qtype in PLAIN_TYPES or _copied(choice) else "stored as 0"
            self.notes.append(f"{_told(choice, min(bad)[0], sum(n for _, n in bad))}: {kept}")
        self.rows[choice.name] = Row(
            choice.name,
            source.shape,
            source.label,
            choice.qtype.name,
            choice.nbytes,
            errors,
            choice.why,
        )
        return out

    @torch.inference_mode()  # as ComfyUI's own thread, and for each thread to be told
    def _pack(self, choice: Choice, out: Tensor, measured: bool, rows: tuple[int, int]) -> Errors:
        """The rows `start` … `stop` in the new type, to their place in `out`; what it cost."""
        (start, stop), source, qtype, errors = rows, choice.source, choice.qtype, Errors()
        block_size, type_size = GGML_QUANT_SIZES[qtype]
        first, last = (row * source.cols // block_size * type_size for row in rows)
        place = out[first:last]
        if _copied(choice):
            place.copy_(source.raw(start, stop))
            if _is_float(qtype):
                x = source.decode(place)
                self._check_finite(choice, x, start)
                if measured:
                    errors.add(x, x)
            return errors
        x = source.read(start, stop)
        sound = self._check_finite(choice, x, start)
        if qtype in PLAIN_TYPES:
            y = place.view(PLAIN_TYPES[qtype]).view(x.shape)
            y.copy_(x)
            if qtype is T.F16:
                self._check_range(choice, x, y)
            if measured:
                errors.add(x, y.float())
            return errors
        if not sound:
            x = x.nan_to_num(0.0, 0.0, 0.0)
        importance = self.options.importance.get(choice.name)
        blocks = quantize(x, qtype, importance, self.options.effort, place.view(stop - start, -1))
        if measured:
            errors.add(x, dequantize(blocks, qtype, tuple(x.shape)))
        if errors.nonfinite if measured else max(map(abs, x.aminmax())) > _SAFE:
            self._check_range(choice, x, dequantize(blocks, qtype, tuple(x.shape)))
        return errors

    def _check_finite(self, choice: Choice, x: Tensor, start: int) -> bool:
        """Whether all of `x` is finite. Raises: GGUFError where it is not and must be."""
        if all_finite(x):
            return True
        finite = x.isfinite()
        count = x.numel() - int(finite.sum())
        row = start + int((~finite.view(-1)).nonzero()[0]) // max(1, choice.source.cols)
        if not self.options.allow_nonfinite:
            raise GGUFError(
                f"{choice.source.path}: {_told(choice, row, count)}: the file is damaged or badly "
                "trained: get another, or go on with --allow-nonfinite"
            )
        self.bad.setdefault(choice.name, []).append((row, count))
        return False

    def _check_range(self, choice: Choice, x: Tensor, stored: Tensor) -> None:
        """Raises: GGUFError where what is finite in `x` is not so in `stored`: a half, which is
        also what most blocks' scales are, ends at 65504."""
        if not bool((lost := x.isfinite() & ~stored.isfinite()).any()):
            return
        raise GGUFError(
            f"{choice.source.path}: tensor {choice.source.name!r} holds "
            f"{float(x[lost].abs().max())}, which {choice.qtype.name} cannot: add --tensor "
            f"{choice.name}=BF16"
        )


def _copied(choice: Choice) -> bool:
    """Whether the stored bytes are taken as they are."""
    return choice.source.qtype is choice.qtype and choice.source.scale is None


def _told(choice: Choice, row: int, count: int) -> str:
    return f"tensor {choice.source.name!r} holds {count} NaN or infinite weights, row {row} on"


def _is_float(qtype: T) -> bool:
    return qtype not in PLAIN_TYPES or PLAIN_TYPES[qtype].is_floating_point
