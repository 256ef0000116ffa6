"""`python -m distill trajectory|match|split --model FILE …`: the stages on a MODEL of ComfyUI's.

What is read once is kept in the folder: NAME-data.pt, the latents and the encoded prompts;
NAME-states/, the teacher's trajectories. NAME.pt is the checkpoint from which a stopped run goes
on, NAME.jsonl its losses, sheets/NAME/ sketches of what the student draws, NAME.safetensors the
LoRA. `split` trains NAME-low and NAME-high from one student, and NAME.safetensors merges them.
"""

import hashlib
import logging
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..host.files import is_safetensors, read
from ..host.learned import save_lora, sketch, sketched
from ..host.loading import load_diffusion_model, load_text_encoders, load_vae
from ..host.training import joined, training
from . import folder as data
from .commands import two_steps
from .few_step_lora import Plan, build
from .loop import Budget, check_config, load_checkpoint, save_atomically, train
from .merge import BRANCHES, merge_loras
from .runs import changed
from .settings import check_settings
from .several import One, processes
from .watch import Watch

log = logging.getLogger(__name__)

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)  # uniform, shift 3, rounded
METHODS = {"trajectory": "trajectory", "match": "matching", "split": "matching"}
SMALLEST, LARGEST = 16, 2**14  # pixels a side: a patch of latents, and ComfyUI's MAX_RESOLUTION
GUIDANCE = 3.0  # of the teacher, where --set says nothing else


def run(options: Namespace) -> Path | None:
    """Train as the command line says; the LoRA's file, None for a dry run, which keeps nothing.
    Raises: ValueError naming the remedy.
    """
    name = options.name or f"{Path(options.model).stem}-{options.command}"
    if name.endswith("-data"):
        raise ValueError(f"--name {name}: {name}.pt would be what another run keeps; take another")
    plan = read_plan(options.command, options.set)
    together = processes(cpu=options.device == "cpu")
    if together.number:
        logging.getLogger("fewstep").setLevel(logging.WARNING)
    stage = _run
    if options.command == "split":
        if options.start is None:
            raise ValueError("split goes on from a student: pass its LoRA as --start")
        stage = _split
    if options.dry_run:
        with TemporaryDirectory() as passing:
            options.folder = Path(passing)
            return stage(options, plan, name, together)
    options.folder.mkdir(parents=True, exist_ok=True)
    check_there(options.model)
    return stage(options, plan, name, together)


def _split(options: Namespace, plan: Plan, name: str, together: One) -> Path | None:
    """Both branches of stage 3, each as `_run` has it, and their merge."""
    made = [
        _run(options, replace(plan, branch=branch), f"{name}-{part}", together, name)
        for part, branch in BRANCHES.items()
    ]
    if options.dry_run:
        return None
    path = options.folder / f"{name}.safetensors"
    if together.number == 0:
        low, high = (read_lora(str(one)) for one in made)
        save_lora(merge_loras(low, high, options.ratio), path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {options.ratio:g} of the high branch")
    return path


def _run(
    options: Namespace, plan: Plan, name: str, together: One, shared: str | None = None
) -> Path | None:
    """`shared`: name before what is read once, if not the run's own."""
    start = None if options.start is None else read_lora(str(options.start))
    shared = shared or name
    with together.first():
        latents, positive, negative = dataset(options, options.folder / f"{shared}-data.pt")
    model = load_diffusion_model(str(options.model))
    latents = joined(model, [{"samples": latents, "downscale_ratio_spacial": 8}])
    shape = tuple(latents.shape[1:])
    given = (model, positive, negative, shape)
    with training(*given, **plan.training(together)) as backbone:
        if latents.any():
            latents = backbone.model.process_latent_in(latents)
        states = options.folder / f"{shared}-states"
        told = [positive, negative]
        origin = {"model": Path(options.model).name, "prompts": fingerprint(told), "shape": shape}
        task = build(plan, backbone, latents, states, start, together, origin)
        if options.dry_run:
            print("\n".join(f"{key}: {value}" for key, value in asdict(plan).items()))
            loss, told = two_steps(task, plan.steps)
            print(f"loss {loss:.4f}; {told}")
            return None
        # one of several processes cannot draw alone with what all share
        drawn = sketched(backbone.model) and together.count == 1
        sheet = (lambda: sketch(backbone.model, task.draw())) if drawn else None
        watch = Watch(options.folder, name, lambda: task.metrics, sheet, options.sheet_minutes)
        made = {**asdict(plan), "model": Path(options.model).name, "start": str(options.start)}
        made["data"] = fingerprint([told, latents])
        budget = Budget(samples=plan.steps * plan.batch)
        checkpoint, writes = options.folder / f"{name}.pt", together.number == 0
        done = train(task, checkpoint, budget, 180.0, made, watch, writes)
        path = options.folder / f"{name}.safetensors"
        if writes:
            save_lora(task.weights(), path)
            print(
                f"{path}: {path.stat().st_size / 1e6:.1f} MB after {done.steps} steps; draw with "
                f"sigmas {' '.join(f'{sigma:g}' for sigma in plan.sigmas)} at CFG 1"
            )
        return path


def read_lora(path: str) -> dict[str, Tensor]:
    """Raises: ValueError naming a file that is not there, or not, or no whole, safetensors."""
    check_there(Path(path), ", the LoRA to start from")
    if not is_safetensors(path):
        raise ValueError(f"{path}: the LoRA to start from is no .safetensors file")
    return read(path)[0]


def fingerprint(value: Any) -> str:
    """A short name of nested values and tensors, equal for equal ones."""
    state = hashlib.sha256()

    def add(part: Any) -> None:
        if torch.is_tensor(part):
            state.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, dict):
            add(sorted(part.items()))
        elif isinstance(part, list | tuple):
            for one in part:
                add(one)
        else:
            state.update(repr(part).encode())

    add(value)
    return state.hexdigest()[:16]


def read_plan(command: str, changes: list[str]) -> Plan:
    """A Plan with KEY=VALUE changes. Raises: ValueError naming what is not known, and what is."""
    own = {"sigmas": SIGMAS, "guidance": GUIDANCE, "method": METHODS[command]}
    given = changed(changes)
    if "method" in given:
        raise ValueError(f"method is the command's to say: trajectory or match, not {command}")
    return Plan(**own | check_settings(Plan, given))


def dataset(options: Namespace, kept: Path) -> tuple[Tensor, list, list]:
    """Latents (m, channels, h, w), all zero for prompts alone; positive and negative CONDITIONING.

    Encoded once: `kept` holds them. Raises: ValueError naming the remedy.
    """
    if (options.images is None) == (options.prompts is None):
        raise ValueError("what is to be learned? Pass --images FOLDER or --prompts FILE, just one")
    pictures = data.captioned(options.images) if options.images else []
    texts = [words for _, words in pictures] or data.prompts(options.prompts)
    if any(side % 8 or not SMALLEST <= side <= LARGEST for side in options.size or ()):
        given = " ".join(map(str, options.size))
        raise ValueError(
            f"--size is {given}: each side needs {SMALLEST} to {LARGEST} pixels, and whole eights"
        )
    files = [f"{path.name} {path.stat().st_mtime_ns}" for path, _ in pictures]
    size = list(options.size) if options.size and pictures else []
    made = {
        "texts": [*texts, options.negative],
        "files": files,
        "size": size,
        "text_encoder": sorted(name_and_size(file) for file in options.text_encoder or ()),
        "clip_type": options.clip_type,
        "vae": name_and_size(options.vae) if pictures and options.vae else "",
    }
    if kept.exists():
        state = load_checkpoint(kept)
        # what is encoded needs no encoders
        check_config(
            kept, state["made"], made, [key for key in ("text_encoder", "vae") if not made[key]]
        )
    else:
        state = {"made": made} | _encoded(options, pictures, texts)
        save_atomically(state, kept)
    if pictures:
        latents = state["latents"]
    else:
        width, height = options.size or (1024, 1024)
        latents = torch.zeros(1, 4, height // 8, width // 8)  # see host.training.joined
    return latents, state["positive"], state["negative"]


def name_and_size(file: Path) -> str:
    """By which another file is told. Raises: ValueError where there is none."""
    check_there(file)
    return f"{file.name} {file.stat().st_size}"


def check_there(file: Path, what: str = "") -> None:
    """Raises: ValueError where there is no such file, `what` after its name."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}{what}")


def _encoded(options: Namespace, pictures: list, texts: list[str]) -> dict:
    with torch.inference_mode():
        if not options.text_encoder:
            raise ValueError("the prompts need --text-encoder FILE, one or more")
        clip = load_text_encoders([str(f) for f in options.text_encoder], options.clip_type)
        positive = data.encode_prompts(clip, texts)
        negative = data.encode_prompts(clip, [options.negative])
        encoded = {"positive": positive, "negative": negative}
        if pictures:
            if not options.vae:
                raise ValueError("pictures need --vae FILE")
            paths = [path for path, _ in pictures]
            latents = data.encode_pictures(load_vae(str(options.vae)), paths, options.size)
            encoded["latents"] = latents.cpu()
    return encoded
