"""A MODEL of the graph into a GGUF file: `quant`'s plan and conversion, with the host's progress,
its stop button and its output folder."""

import os
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch

from ..flow import Preset
from ..quant.budget import fit, parse_budget
from ..quant.convert import Options, check_destination, check_importance, convert
from ..quant.effort import EFFORTS
from ..quant.importance import read_importance
from ..quant.plan import make_plan
from ..quant.plot import picture_of
from ..quant.recipes import BY_BUDGET, recipe_or_type
from ..quant.report import Report
from .loading import PRESET
from .weights import model_source


def quantize_model(
    model,
    destination: Path,
    recipe: str,
    budget: str = "",
    importance: str | None = None,
    preset: Preset | None = None,
    effort: str = EFFORTS[0],
) -> Report:
    """Write a MODEL, LoRAs baked in, as `destination`; what that cost.

    recipe: a recipe's or type's name; `budget`, unless empty ('1.8GB', '4.5bpw'), goes before it.
    importance: path of an importance file. preset: the schedule to write; None: the MODEL's own.
    effort: see `quant.quantize`.

    Raises: GGUFError naming what is wrong; the host's interrupt. Nothing is left behind then.
    """
    weighing = read_importance(importance) if importance else {}
    room = parse_budget(budget) if budget else None
    source = model_source(model, preset or model.get_attachment(PRESET))
    plan = make_plan(source, BY_BUDGET if room else recipe_or_type(recipe))
    check_importance(plan, weighing)
    progress = _progress()
    options = Options(progress=progress, importance=weighing, effort=effort)
    if room:
        check_destination(plan, destination, size=0)
        plan = fit(plan, room(plan), weighing, progress)
    report = convert(plan, destination, options=options)
    report.title = report.title.replace(str(destination), in_output(destination))
    return report


def _progress():
    """A callback that moves the node's bar and stops where the person has pressed stop."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int, _name: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


def output_file(prefix: str, end: str = "") -> Path:
    """The next free PREFIX+END_00001_.gguf below the output folder, numbered as stock save nodes
    do.

    Raises: ValueError for a prefix without a name; the host's error outside the output folder.
    """
    prefix = prefix.strip()
    if not os.path.basename(prefix).strip("."):
        raise ValueError(f"filename_prefix {prefix!r} names no file: end it with a name.")
    output = folder_paths.get_output_directory()
    folder, name, number, _, _ = folder_paths.get_save_image_path(prefix + end, output)
    return Path(folder) / f"{name}_{number:05}_.gguf"


def in_output(path: Path) -> str:
    """`path` as seen from the output folder, with forward slashes."""
    return Path(os.path.relpath(path, folder_paths.get_output_directory())).as_posix()


def plot(report: Report) -> torch.Tensor:
    """The report as IMAGE, (1, height, width, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture_of(report), dtype=np.float32) / 255).unsqueeze(0)
