"""A run: one stage, its settings and what it starts from, as a JSON file describes it.

    {"stage": "match", "teacher": "teacher", "start": "trajectory", "samples": 12800,
     "settings": {"renoise": "shared"}}

Its name is the file's, unless given, and what it makes lies in one folder: NAME.pt, the checkpoint;
NAME.jsonl, the losses; sheets/NAME/, pictures. `settings` are fields of the stage's configuration;
what is left out has the default that is explained there.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..host.training import check_memory
from .align import AlignTask
from .backbone import Copies
from .dataset import Dataset
from .either import EitherTask
from .kept import TEACHERS, checkpoint, model_of, schedule, weights_of
from .loop import Budget, Done, Task, load_checkpoint, save_atomically, train
from .match import MatchConfig, MatchTask
from .memory import memory_needed
from .merge import BRANCHES, merge
from .model import FlowModel, ModelConfig
from .settings import check_settings
from .style import StyleConfig, StyleTask
from .teacher import TeacherConfig, TeacherTask
from .trajectory import TrajectoryConfig, TrajectoryTask
from .watch import Watch

CONFIGS = Path(__file__).parent / "configs"
SETTINGS = {
    "align": TeacherConfig,
    "teacher": TeacherConfig,
    "either": TeacherConfig,
    "trajectory": TrajectoryConfig,
    "match": MatchConfig,
    "style": StyleConfig,
}
OF_A_RUN = ("samples", "teacher", "start")  # beside its stage's settings


@dataclass(frozen=True)
class Run:
    """teacher, start: names of runs in the same folder (start also "../NAME")."""

    name: str
    stage: str
    settings: TeacherConfig | TrajectoryConfig | MatchConfig | StyleConfig
    samples: int
    teacher: str | None = None
    start: str | None = None

    def described(self) -> dict[str, Any]:
        """Plain values, as they stand in its checkpoints; how long it is trained is left open."""
        known = {"stage": self.stage, "teacher": self.teacher, "start": self.start}
        return known | asdict(self.settings)


def read_run(config: str | Path, name: str | None = None, changes: Sequence[str] = ()) -> Run:
    """The run of a JSON file, or of the one of that name under `configs`, with KEY=VALUE changes.

    Raises: ValueError naming what is not known, and what is.
    """
    path = Path(config) if Path(config).suffix == ".json" else CONFIGS / f"{config}.json"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
        raise ValueError(f"{path} does not exist. Configurations that come with it: {known}")
    try:
        given = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error
    settings = given.pop("settings", {})
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: settings are {settings!r}, expected an object of names and values"
        )
    for key, value in changed(changes).items():
        place = given if key in OF_A_RUN else settings
        place[key] = value
    stage = given.get("stage")
    if not isinstance(stage, str) or stage not in SETTINGS:
        raise ValueError(f"{path}: stage is {stage!r}, expected one of {', '.join(SETTINGS)}")
    settings = check_settings(SETTINGS[stage], settings, f"{path}: ", OF_A_RUN)
    if "samples" not in given:
        raise ValueError(f"{path} does not say samples: how many to train on")
    if odd := set(given) - {"stage", *OF_A_RUN}:
        raise ValueError(f"{path}: a run has no {sorted(odd)[0]}; settings stand under settings")
    if stage not in TEACHERS and given.get("teacher") is None:
        raise ValueError(f"{path} does not say teacher: the run that a {stage} learns from")
    given = check_settings(Run, given, f"{path}: ")
    return Run(name=name or path.stem, settings=SETTINGS[stage](**settings), **given)


def changed(changes: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE of the command line; values as JSON has them, or else texts."""
    made = {}
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise ValueError(f"--set {change}: expected KEY=VALUE")
        made[key] = plain(value)
    return made


def kept_run(folder: Path, name: str) -> Run:
    """A run as its checkpoint has it. Raises: FileNotFoundError; ValueError for a merge's."""
    config = dict(checkpoint(folder, name)["config"])
    stage, teacher, start = (config.pop(key, None) for key in ("stage", "teacher", "start"))
    if stage not in SETTINGS:
        raise ValueError(f"{folder / name}.pt was not trained but made of others: it is a {stage}")
    known = {field.name for field in fields(SETTINGS[stage])}
    settings = SETTINGS[stage](**{key: config[key] for key in known & set(config)})
    return Run(name, stage, settings, 0, teacher, start)


def plain(value: str) -> Any:
    """A value from the command line: JSON where it is that, else the text itself."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def build(run: Run, folder: Path, dataset: Dataset, device: str = "cpu") -> Task:
    """The task of a run, as it starts. Raises: FileNotFoundError for a run that it starts from."""
    settings = run.settings
    if run.stage in TEACHERS:
        data = _data(dataset, settings, settings.encoders)
        given = (settings, dataset.vocabulary, data, device)
        if run.stage == "align":
            task = AlignTask(*given, widths=dataset.widths)
        else:
            task = (EitherTask if run.stage == "either" else TeacherTask)(*given)
        if run.start:
            state = checkpoint(folder, run.start)
            if state["config"]["stage"] not in TEACHERS:
                raise ValueError(f"{run.start} is a student: a teacher starts from a teacher's run")
            task.start_from(state["task"]["ema"])
        return task
    taught = checkpoint(folder, run.teacher)
    teacher = model_of(folder, taught, dataset)
    encoders = 2 if "t5.shared.weight" in teacher.state_dict() else 1
    start = None if run.start is None else weights_of(folder, run.start)
    backbone = Copies(teacher, device)
    given = (settings, backbone, _data(dataset, settings, encoders), start)
    if run.stage == "match":
        return MatchTask(*given)
    if run.stage == "style":
        shape = dataset.batch(1, encoders, 0)[0].shape[1:]
        styled = partial(dataset.styled, settings.style, settings.batch, encoders)
        return StyleTask(settings, backbone, styled, start, shape=shape)

    def mend(number: int, latents: Tensor) -> Tensor:
        return dataset.mended(latents, _number(settings, number))

    states = folder / f"{settings.states or run.name}-states"
    trained = taught.get("done", {}).get("samples")
    origin = {"teacher": run.teacher, "teacher's samples": trained}
    return TrajectoryTask(*given, folder=states, mend=mend, origin=origin)


def _number(settings, index: int) -> int:
    """The data set's number of a run's batch `index`."""
    return 1_000_000 * settings.seed + index


def _data(dataset: Dataset, settings, encoders: int):
    """Batches by number; each seed sees others. Raises: ValueError for an empty or wordless one."""

    def data(index: int) -> tuple[Tensor, Tensor]:
        latents, tokens = dataset.batch(settings.batch, encoders, _number(settings, index))
        if len(latents) == 0 or len(latents) != len(tokens):
            raise ValueError(
                f"batch {index} holds {len(latents)} latents and {len(tokens)} prompts: give the "
                "dataset as many captions as pictures, one or more"
            )
        return latents, tokens

    return data


def train_run(
    run: Run, folder: Path, dataset: Dataset, device: str = "cpu", sheet_minutes: float = 5.0
) -> Done:
    """Train a run to the end of its budget, going on from its own checkpoint if there is one.

    Raises: ValueError with an estimate where there is too little memory.
    """
    task = build(run, folder, dataset, device)
    check_memory(memory_of(task, dataset), torch.device(device))
    sigmas, cfg = schedule(run.described())

    def sheet() -> np.ndarray:
        return dataset.sheet(_drawn(task), sigmas, cfg)

    watch = Watch(folder, run.name, lambda: task.metrics, sheet, sheet_minutes)
    path = folder / f"{run.name}.pt"
    return train(task, path, Budget(samples=run.samples), 60, run.described(), watch)


def memory_of(task: Task, dataset: Dataset) -> int:
    """Bytes that a run will take beside the weights that it starts from, estimated."""
    model = task.model if isinstance(task, TeacherTask) else task.backbone.teacher
    height, width = dataset.batch(1, 1, 0)[0].shape[2:]
    return memory_needed(task, model, height * width)


def _drawn(task: Task) -> FlowModel:
    """What a task has learned so far, for drawing."""
    if isinstance(task, TeacherTask):
        return task.drawn()
    return task.backbone.drawn(task.weights())


def branches(run: Run) -> tuple[Run, Run]:
    """The two runs of stage 3 that start from one student: low and high noise, parted at 0.5."""
    if run.stage != "match":
        raise ValueError(f"the configuration is for {run.stage}: only a match has two branches")
    low, high = (
        replace(run, name=f"{run.name}-{part}", settings=replace(run.settings, branch=branch))
        for part, branch in BRANCHES.items()
    )
    return low, high


def merged(folder: Path, run: Run, ratio: float) -> dict:
    """The merge of a run's two branches, (1 − ratio)·low + ratio·high, as a checkpoint.

    Raises: ValueError for a ratio that is none.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}: expected a share from 0 to 1")
    parts = [branch.name for branch in branches(run)]
    low, high = (weights_of(folder, part) for part in parts)
    config = checkpoint(folder, parts[0])["config"] | {"stage": "merge", "ratio": ratio}
    config.pop("branch")
    return {"task": {"weights": merge(low, high, ratio)}, "config": config}


def adopt_run(folder: Path, run: Run, shipped: str, dataset: Dataset) -> Path:
    """Write a flow model that ships as a run, so that no one need train it again: a student if it
    is drawn without CFG, else a teacher. It is as exact as its file.

    The sizes of a teacher are those that `run` would have; a student is of the run `run.teacher`.
    Raises: FileNotFoundError for a student's teacher that is not there.
    """
    path = folder / f"{run.name}.pt"
    if path.exists() and "shipped" not in load_checkpoint(path).get("config", {}):
        raise ValueError(f"{path} was trained here: adopt under another name, or delete it")
    if run.stage not in TEACHERS:
        raise ValueError(f"a {run.stage} says no sizes: pass the --config of a teacher")
    config = run.described() | {"start": None, "shipped": shipped}
    sizes = {field.name: config[field.name] for field in fields(ModelConfig)}
    try:
        model, preset = dataset.shipped(shipped, ModelConfig(**sizes))
    except RuntimeError as error:
        told = ", ".join(f"{key} {value}" for key, value in sizes.items())
        raise ValueError(f"{shipped} has other sizes than the configuration: {told}") from error
    if preset.cfg == 1:
        teacher = run.teacher or "teacher"
        if run.name == teacher:
            raise ValueError(
                f"{shipped} is a student of the run {teacher}: adopt it under another name"
            )
        if checkpoint(folder, teacher)["config"]["stage"] not in TEACHERS:
            raise ValueError(f"{folder / teacher}.pt is no teacher's: adopt one, by another name")
        sigmas = tuple(preset.sigmas().tolist())
        config = {"stage": "adopted", "teacher": teacher, "sigmas": sigmas, "shipped": shipped}
        task = {"weights": model.mmdit.state_dict()}
    else:
        task = {"ema": model.state_dict()}
    save_atomically({"task": task, "config": config, "done": {}}, path)
    return path
