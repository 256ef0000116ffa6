"""What `python -m distill` does once ComfyUI is importable; see `__main__` for the options."""

import json
import platform
import statistics
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from PIL import Image

from ..host.cpu import capabilities
from ..host.learned import save_whole
from ..host.training import check_memory
from . import kept, runs
from .dataset import Dataset
from .logs import EVALUATIONS, NOISE, SHIPPED, TIMES
from .loop import Task, load_checkpoint, save_atomically
from .lora import as_file
from .merge import RATIOS
from .noise import noise_scale
from .runs import Run
from .table import page

SHIPPED_STEPS = {"fewstep-demo": (4, 2), "fewstep-teacher": (50,)}


def train(options: Namespace, dataset: Dataset) -> None:
    """Train one run, or say what it would take."""
    run = read(options)
    if run.stage != options.command:
        raise ValueError(f"the configuration is for {run.stage}, not for {options.command}")
    _train(run, options, dataset)


align = teacher = either = trajectory = match = style = train


def split(options: Namespace, dataset: Dataset) -> None:
    """Train both branches of stage 3."""
    for branch in runs.branches(read(options)):
        _train(branch, options, dataset)


def read(options: Namespace) -> Run:
    return runs.read_run(options.config, options.name, options.set)


def _train(run: Run, options: Namespace, dataset: Dataset) -> None:
    if options.dry_run:
        print(dry_run(run, options.folder, dataset, options.device))
    else:
        runs.train_run(run, options.folder, dataset, options.device, options.sheet_minutes)


def dry_run(run: Run, folder: Path, dataset: Dataset, device: str) -> str:
    """A line for each setting, then what some steps say of memory and time; nothing is saved.

    Raises: ValueError with an estimate where there is too little memory.
    """
    task = runs.build(run, folder, dataset, device)
    needed = runs.memory_of(task, dataset)
    check_memory(needed, torch.device(device))
    with TemporaryDirectory() as passing:
        if run.stage == "trajectory":
            task.folder = Path(passing)
        loss, told = two_steps(task, -(-run.samples // task.batch))
    size = sum(value.nbytes for value in _tensors(task.state_dict()))
    lines = [f"{key}: {value}" for key, value in run.described().items()]
    lines += [
        f"loss {loss:.4f}; {told}",
        f"{needed / 1e9:.1f} GB of memory beside the weights, and {size / 1e6:.0f} MB on disk",
    ]
    return "\n".join(lines)


def two_steps(task: Task, steps: int) -> tuple[float, str]:
    """Loss of the second step, in which what is needed but once is not timed; and what is said of
    the time that `steps` take. Batches that are seen again take longer when they are first made.
    """
    waits = getattr(task, "waits", 0)  # steps in which the student itself does not learn yet
    task.step(waits, 0.0)
    loss, seconds = _timed(task, waits + 1)
    made = min(getattr(getattr(task, "config", None), "batches", steps), steps)
    told, total = f"{seconds:.2f} s each", steps * seconds
    if made < steps:
        _, again = _timed(task, waits + 1)
        told = f"{seconds:.2f} s each of the first {made}, then {again:.2f} s"
        total = made * seconds + (steps - made) * again
    return loss, f"{steps} steps of {task.batch} samples, {told}: about {total / 60:.0f} minutes"


def _timed(task: Task, index: int) -> tuple[float, float]:
    """Loss and seconds of a step."""
    start = perf_counter()
    loss = float(task.step(index, 0.0))
    return loss, perf_counter() - start


def _tensors(state):
    """Every tensor of a nested state."""
    if hasattr(state, "nbytes"):
        yield state
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def merge(options: Namespace, dataset: Dataset) -> None:
    """Merge at the ratio asked for, or score every ratio of RATIOS and take the best."""
    run = read(options)
    path = options.folder / f"{run.name}.pt"
    if path.exists() and load_checkpoint(path).get("config", {}).get("stage") != "merge":
        raise ValueError(f"{path} was not merged but trained: give another --name, or delete it")
    ratios = RATIOS if options.ratio is None else (options.ratio,)
    scores = {}
    for ratio in ratios:
        state = runs.merged(options.folder, run, ratio)
        model, drawn = kept.model_of(options.folder, state, dataset), kept.schedule(state["config"])
        note = {"ratio": ratio}
        scored = _evaluate(run.name, state, model, drawn, options, dataset, note, choosing=True)
        scores[ratio] = scored["overall"], scored["right"]
    best = max(scores, key=scores.get)
    save_atomically(runs.merged(options.folder, run, best), path)
    print(f"{path}: ratio {best} of the high branch")


def adopt(options: Namespace, dataset: Dataset) -> None:
    """Write a model that ships as a run."""
    print(runs.adopt_run(options.folder, read(options), options.shipped, dataset))


def eval(options: Namespace, dataset: Dataset) -> None:  # named as its command
    """Score runs, and add a line to evaluations.jsonl for each."""
    for name in options.name:
        state = kept.checkpoint(options.folder, name)
        sigmas, cfg = kept.schedule(state["config"], options.steps)
        drawn = sigmas, cfg if options.cfg is None else options.cfg
        model, note = kept.model_of(options.folder, state, dataset), {}
        if options.recipe:
            model, note = dataset.quantised(model, options.recipe), {"recipe": options.recipe}
        _evaluate(name, state, model, drawn, options, dataset, note)
        if options.sheet:
            parts = [name, str(len(sigmas) - 1), *note.values(), options.encoders]
            path = options.folder / "sheets" / ("-".join(parts).replace(" ", "-") + ".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(dataset.sheet(model, *drawn, options.encoders)).save(path)


def _evaluate(
    name, state, model, drawn, options, dataset, note, choosing=False
) -> dict[str, float]:
    """`drawn`: sigmas and CFG."""
    (sigmas, cfg), config = drawn, state["config"]
    told = {key: config[key] for key in ("stage", "renoise", "seed") if key in config}
    trained = {"trained": done["samples"]} if (done := state.get("done")) else {}
    note = told | trained | note
    scores = dataset.evaluate(model, sigmas, cfg, options.captions, options.encoders, choosing)
    row = {
        "name": name,
        "steps": len(sigmas) - 1,
        "cfg": cfg,
        "encoders": options.encoders,
        "captions": options.captions,
        **note,
        **scores,
    }
    _note(options.folder / EVALUATIONS, row)
    return scores


def export(options: Namespace, dataset: Dataset) -> None:
    """Write a run's GGUF files, whose metadata say how it is sampled; of a LoRA, its own file."""
    state = kept.checkpoint(options.folder, options.name)
    if rank := state["config"].get("rank"):
        path = options.models / "loras" / f"fewstep-{options.name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = as_file(state["task"]["ema"], rank)
        save_whole(tensors, path, {"fewstep.run": json.dumps(state["config"])})
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
        return
    file = options.file or f"fewstep-{options.name}"
    for path in _export(options.name, options.models, options, dataset, file):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _export(
    name: str, models: Path, options: Namespace, dataset: Dataset, file: str | None = None
) -> list[Path]:
    state = kept.checkpoint(options.folder, name)
    config, model = state["config"], kept.model_of(options.folder, state, dataset)
    chords = kept.chords_of(options.folder, config)
    preset = kept.preset_of(file or f"fewstep-{name}", config, chords)
    return dataset.export(model, preset, models, options.recipe, file)


def time(options: Namespace, dataset: Dataset) -> None:
    """Time runs side by side as their users would: files, loaded and drawn by ComfyUI."""
    with TemporaryDirectory() as folder:
        folders = [Path(folder) / str(number) for number in range(len(options.name))]
        for name, models in zip(options.name, folders, strict=True):
            _export(name, models, options, dataset)
        drawn = dataset.through_host(folders, options.turns, options.pictures)
    widest = torch.backends.cpu.get_cpu_capability()  # of torch's kernels: none knows of AMX
    processor = f"{platform.machine()} {widest}" + " AMX" * bool(capabilities().get("amx_bf16"))
    for name, taken in zip(options.name, drawn, strict=True):
        seconds, sampling = (
            [each / options.pictures for each in part] for part in zip(*taken, strict=True)
        )
        row = {
            "name": name,
            "steps": len(kept.schedule(kept.checkpoint(options.folder, name)["config"])[0]) - 1,
            "seconds": statistics.median(seconds),
            "sampling": statistics.median(sampling),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "turns": options.turns,
            "threads": torch.get_num_threads(),
            "pictures": options.pictures,
            "processor": processor,
        }
        _note(options.folder / TIMES, row)


def shipped(options: Namespace, dataset: Dataset) -> None:
    """Score the files that ship, through ComfyUI and by both scorers."""
    if odd := set(options.name) - set(SHIPPED_STEPS):
        raise ValueError(f"no {min(odd)} ships: there are {' and '.join(SHIPPED_STEPS)}")
    for name, steps in SHIPPED_STEPS.items():
        if name in options.name or not options.name:
            for row in dataset.prove(name, steps, options.captions):
                _note(options.folder / SHIPPED, row)


def noise(options: Namespace, dataset: Dataset) -> None:
    """Measure the gradients of runs of stage 2, each as it was trained, with its own proxy."""
    for name in options.name:
        run = runs.kept_run(options.folder, name)
        if run.stage != "match":
            raise ValueError(f"{name} is a run of {run.stage}: noise is measured of those of match")
        task = runs.build(run, options.folder, dataset, options.device)
        task.load_state_dict(kept.checkpoint(options.folder, run.name)["task"])
        for step in run.settings.steps():
            row = {
                "name": run.name,
                "renoise": run.settings.renoise,
                "sigma": run.settings.sigmas[step],
                "scale": round(noise_scale(task, step, options.batches), 1),
                "batches": options.batches,
            }
            _note(options.folder / NOISE, row)


def table(options: Namespace, dataset: Dataset) -> None:
    """Write distilled.md from what the folder's runs have logged."""
    text, folder = page(options.folder), options.docs or options.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "distilled.md").write_text(text, encoding="utf-8")
    print(folder / "distilled.md")


def _note(path: Path, row: dict) -> None:
    """Print a line, its numbers rounded, and add it to a log.

    Raises: OSError naming a log that cannot be written.
    """
    row = {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
