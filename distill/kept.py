"""What runs keep: the checkpoint NAME.pt in their folder, its model, and how that is sampled.

A checkpoint holds its whole configuration, so that it can be drawn with by its name alone.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..flow import Preset, check_sigmas, uniform
from ..host.files import is_finite
from .dataset import Dataset
from .loop import load_checkpoint
from .model import FlowModel, ModelConfig

TEACHERS = ("align", "teacher", "either")  # stages whose checkpoints hold a whole FlowModel
TEACHER_STEPS, SHIFT, GUIDANCE = 50, 3.0, 2.0  # with which a teacher is drawn


def checkpoint(folder: Path, name: str) -> dict:
    """A run's. Raises: FileNotFoundError; ValueError for another file, or naming averaged weights
    with NaN in them.
    """
    path = folder / f"{name}.pt"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: train the run {name} first, or adopt one of that name, or start "
            "from another by --set start=NAME"
        )
    state = load_checkpoint(path)
    if not isinstance(state.get("task"), dict) or "stage" not in state.get("config", {}):
        raise ValueError(f"{path} is no checkpoint of a run of the miniature: name another run")
    for kept in ("weights", "ema"):
        for weight, tensor in state["task"].get(kept, {}).items():
            if not is_finite(tensor):
                raise ValueError(f"{path}: {weight} holds NaN or infinity: train or adopt it again")
    return state


def load_model(folder: Path, name: str, dataset: Dataset) -> FlowModel:
    """The averaged weights of a run, for drawing. Raises: FileNotFoundError for one not trained."""
    return model_of(folder, checkpoint(folder, name), dataset)


def model_of(folder: Path, state: dict, dataset: Dataset) -> FlowModel:
    """The averaged weights of a run's checkpoint; of a student the rest is its teacher's."""
    config = state["config"]
    if config["stage"] not in TEACHERS:
        model = load_model(folder, config["teacher"], dataset)
        model.mmdit.load_state_dict(state["task"]["weights"])
        return model
    sizes = {field.name: config[field.name] for field in fields(ModelConfig)}
    model = FlowModel(ModelConfig(**sizes), dataset.vocabulary)
    model.load_state_dict(state["task"]["ema"])
    return model.eval().requires_grad_(False)


def weights_of(folder: Path, name: str) -> dict[str, Tensor]:
    """The averaged weights of a student's MMDiT."""
    state = checkpoint(folder, name)
    if "weights" not in state["task"]:
        raise ValueError(f"{folder / name}.pt is no student's: start from one, or from nothing")
    return state["task"]["weights"]


def schedule(config: dict[str, Any], steps: int | None = None) -> tuple[Tensor, float]:
    """Sigmas and CFG with which a run's model is drawn: a student's own, or a teacher's.

    A student that is asked for other `steps` gets uniform ones of the same shift as a teacher's.
    """
    if config["stage"] in TEACHERS:
        return uniform(steps or TEACHER_STEPS, SHIFT), GUIDANCE
    own = check_sigmas(config["sigmas"])
    return (own if steps in (None, len(own) - 1) else uniform(steps, SHIFT)), 1.0


def preset_of(name: str, config: dict[str, Any], chords: Sequence[float] = ()) -> Preset:
    """How a run's model is sampled, for its file's `fewstep.*` metadata; `chords` as `chords_of`
    gives them.
    """
    sigmas, cfg = schedule(config)
    own = tuple(sigmas.tolist())
    return Preset(
        name=name,
        label=name.replace("-", " ").replace("fewstep", "FewStep"),
        steps=len(sigmas) - 1,
        rows=(*_fewer(own, chords), own),
        formula="uniform",  # for other numbers of steps
        shift=SHIFT,
        cfg=cfg,
        sure="H",
        source="this repository: python -m distill",
    )


def chords_of(folder: Path, config: dict[str, Any]) -> tuple[float, ...]:
    """The levels between which a student's way was made straight in stage 1; none if it was not."""
    while config.get("start") and config["stage"] not in (*TEACHERS, "trajectory"):
        config = checkpoint(folder, config["start"])["config"]
    return config.get("chords", ())


def _fewer(levels: Sequence[float], chords: Sequence[float]) -> list[tuple[float, ...]]:
    """Uniform schedules of fewer steps, two at least, that the same student has learned: out of its
    levels, none of their steps around a corner between two chords.
    """
    corners = set(check_sigmas(chords).tolist()) if chords else set(levels)
    rows = (tuple(uniform(steps, SHIFT).tolist()) for steps in range(2, len(levels) - 1))
    return [row for row in rows if corners <= set(row) <= set(levels)]
