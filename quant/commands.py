"""What `python -m quant` does: each command takes the parsed options and prints to stdout."""

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from .architectures import ARCHITECTURES
from .budget import fit, parse_budget
from .compare import compare, field_lines, fields_of, inspect
from .convert import Options, check_destination, check_importance, convert
from .errors import GGUFError
from .importance import read_importance
from .lora import bake, parse_lora
from .plan import make_plan
from .plot import draw, pillow
from .quantize import writable_types
from .recipes import BY_BUDGET, RECIPES, Recipe, recipe_named, recipe_of_type, type_named
from .report import Report
from .sources import OF_THE_FILE, Source, open_source
from .types import PLAIN_TYPES, QTYPES


def run_convert(options: argparse.Namespace) -> None:
    """SRC -> DST, and the report."""
    source = open_source(options.source)
    if options.lora:
        source = bake(source, options.lora, options.prefix)
    source = _scheduled(source, options)
    if options.importance:
        source = replace(source, files=(*source.files, options.importance))
    _check_plot(options.plot)
    plan = make_plan(source, _recipe(options), options.tensor, options.arch, options.prefix)
    work = Options(
        options.allow_nonfinite,
        not options.no_measure,
        _progress(options.quiet),
        read_importance(options.importance) if options.importance else {},
        options.effort,
    )
    if options.budget:
        check_importance(plan, work.importance)
        room = options.budget(plan)
        check_destination(plan, Path(options.destination), size=0)
        plan = fit(plan, room, work.importance, work.progress)
    _show(convert(plan, options.destination, dict(options.meta), work), options)


def _scheduled(source: Source, options: argparse.Namespace) -> Source:
    """With the schedule asked for; where a LoRA is baked in and none is, a note on the old one."""
    if options.preset:
        return replace(source, metadata=options.preset(source.metadata))
    old = source.metadata.get("fewstep.name")
    if not options.lora or old is None or any(k.startswith("fewstep.") for k, _ in options.meta):
        return source
    told = f"the few-step schedule is still the source's, {old}: --preset NAME writes another"
    return replace(source, notes=(*source.notes, told))


def _recipe(options: argparse.Namespace) -> Recipe:
    if options.budget:
        return BY_BUDGET
    return recipe_named(options.recipe) if options.recipe else recipe_of_type(options.type)


def run_compare(options: argparse.Namespace) -> None:
    """B against A."""
    _check_plot(options.plot)
    _show(compare(options.first, options.second, _progress(options.quiet)), options)


def run_inspect(options: argparse.Namespace) -> None:
    """What a file holds."""
    report, fields = inspect(options.file), fields_of(options.file)
    if options.json:
        told = {key: _plain(value) for key, value in fields.items()}
        print(json.dumps(report.as_dict() | {"metadata": told}, indent=2))
        return
    report.notes += field_lines(fields)
    print(report.text(options.tensors))


def _plain(value: object) -> object:
    """A field as JSON has it: text in place of NaN and infinity."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run_recipes(options: argparse.Namespace) -> None:
    """The recipes, a line each."""
    if options.json:
        rows = {
            recipe.name: {
                "about": recipe.about,
                "base": recipe.base.name if recipe.base is not None else "F16 or BF16",
                "rules": [[rule.role, rule.place, rule.qtype.name] for rule in recipe.rules],
            }
            for recipe in RECIPES.values()
        }
        print(json.dumps(rows, indent=2))
        return
    for recipe in RECIPES.values():
        print(f"{recipe.name:<9} {recipe.about}")
    print("\nNever quantised: tensors of one dimension or at most 1024 weights, convolutions, and")
    print("what meets noise, time, text and pixels in", end=" ")
    print(", ".join(row.tag for row in ARCHITECTURES) + ".")


def run_types(options: argparse.Namespace) -> None:
    """The types, a line each."""
    writable = writable_types()
    rows = [(qtype.name, 8.0 * dtype.itemsize, 1, str(dtype)[6:], qtype in writable)
            for qtype, dtype in PLAIN_TYPES.items()]  # fmt: skip
    rows += [(qtype.name, row.bits_per_weight, row.block_size, row.about, qtype in writable)
             for qtype, row in QTYPES.items()]  # fmt: skip
    if options.json:
        keys = ("type", "bits_per_weight", "block", "about", "writable")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
        return
    print(f"{'type':<8} {'bits':>6} {'block':>5}  about")
    for name, bits, block, about, can in rows:
        print(f"{name:<8} {bits:>6.4g} {block:>5}  {about}{'' if can else ' (only read)'}")


def _check_plot(path: str | None) -> None:
    """Raises: GGUFError, before the work, where the plot could not be drawn after it, or might
    take a model's place."""
    if path is None:
        return
    pillow()
    folder = os.path.dirname(path) or "."
    if not path or not os.path.isdir(folder) or os.path.isdir(path):
        raise GGUFError(f"{path}: not a file in a folder that there is")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise GGUFError(f"{path}: cannot be written: change its permissions, or the folder's")
    if path.lower().endswith((".gguf", ".safetensors", ".sft")):
        raise GGUFError(f"{path}: named as a model: give the plot a name of its own, as cost.png")


def _show(report: Report, options: argparse.Namespace) -> None:
    """Print the report as asked, and draw it: the disk may be full, the report is dear."""
    if options.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print(report.text(options.tensors))
    if options.plot:
        draw(report, options.plot)


def _progress(quiet: bool):
    """A callback that draws one line on a terminal's stderr, or None."""
    if quiet or not sys.stderr.isatty():
        return None
    last = 0.0

    def draw(done: int, total: int, name: str) -> None:
        nonlocal last
        finished = done >= total
        if not finished and time.monotonic() - last < 0.1:
            return
        last = time.monotonic()
        width = shutil.get_terminal_size().columns - 1
        bar = "█" * (20 * done // max(1, total))
        line = "" if finished else f"{bar:░<20} {done / max(1, total):4.0%} {name}"
        print(f"\r{line[:width]:<{width}}\r", end="", file=sys.stderr, flush=True)

    return draw


def parse_meta(text: str) -> tuple[str, object]:
    """'key=value' -> (key, value): a number, true, false or a list, in JSON or with commas; else
    text."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    if key.startswith(OF_THE_FILE):
        raise argparse.ArgumentTypeError(f"{key} describes the file itself and is written so")
    for candidate in (value, f"[{value}]"):
        try:
            parsed = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        items = parsed if isinstance(parsed, list) else [parsed]
        if not items or not all(isinstance(item, str | int | float) for item in items):
            continue
        if isinstance(parsed, list) and any(isinstance(item, float) for item in parsed):
            parsed = [float(item) for item in parsed]
        return key, parsed
    return key, value


def parse_override(text: str) -> tuple[str, object]:
    """'PATTERN=TYPE' -> (pattern, type)."""
    pattern, sign, name = text.rpartition("=")
    if not sign or not pattern:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=TYPE")
    return pattern, parse_type(name)


def parse_strength(text: str) -> tuple[str, float]:
    try:
        return parse_lora(text)
    except GGUFError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_size(text: str):
    try:
        return parse_budget(text)
    except GGUFError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_type(name: str):
    try:
        return type_named(name)
    except GGUFError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
