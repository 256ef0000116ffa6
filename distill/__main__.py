"""Distil a few-step model, a stage at a time.

    python -m distill adopt | align | teacher | either | trajectory | match | split
    python -m distill merge | style | eval | time | noise | shipped | table | export
    python -m distill trajectory | match | split --model FILE --text-encoder FILE … --prompts FILE

The last makes a few-step LoRA of any flow model that ComfyUI loads (see `distill/host_run.py`); the
others are of the miniature, and read a configuration (see `distill/configs`, `distill/runs.py`).
Each goes on from its own checkpoint after a kill at any moment, and leaves losses and sample sheets
in the folder.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import run

run.load_pack()

OF_A_MODEL = ("text_encoder", "vae", "images", "prompts", "size")  # options beside --model


def at_least(low: int):
    """A kind of number for argparse."""

    def whole(text: str) -> int:
        if (number := int(text)) < low:
            raise argparse.ArgumentTypeError(f"{number} is less than {low}")
        return number

    return whole


def guidance(text: str) -> float:
    if not 0 <= (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no scale of guidance: 0 or more")
    return number


def share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: 0 to 1")
    return number


def parse_arguments() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m distill", description=__doc__, formatter_class=as_written
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in {
        "align": "a new T5 learns to say what CLIP-L says (at the end once more: --config align-2)",
        "teacher": "flow matching, with encoder dropout (first --config tuned, then flow)",
        "either": "that T5 learns to be enough without CLIP-L",
        "trajectory": "stage 1: regress onto the teacher's integrals between the student's steps",
        "match": "stage 2: distribution matching, timesteps shared or random, adversarial heads",
        "split": "stage 3: train the branches of low and of high noise, each on its own",
        "style": "a LoRA that draws a student's pictures another way",
    }.items():
        stage = commands.add_parser(name, help=about)
        stage.add_argument(
            "--config",
            default=None if name == "style" else name,
            required=name == "style",
            help="JSON file, or one of distill/configs",
        )
        stage.add_argument("--name", type=run_name, help="of the run; default the configuration's")
        stage.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="settings other than the configuration's",
        )
        stage.add_argument(
            "--dry-run", action="store_true", help="one step: settings, memory, time; saves nothing"
        )
        stage.add_argument("--sheet-minutes", type=float, default=5.0, help="default 5")
        if name in ("trajectory", "match", "split"):
            add_model_options(stage)
        if name == "split":
            stage.add_argument(
                "--ratio",
                type=share,
                default=0.5,
                help="of the high branch in a LoRA of --model; default 0.5 (the miniature: merge)",
            )
    merge = commands.add_parser("merge", help="merge the branches, at the ratio that scores best")
    merge.add_argument("--config", default="split")
    merge.add_argument("--name", type=run_name, help="of the run; default the configuration's")
    merge.add_argument("--ratio", type=float, help="of the high branch; default: search")
    adopt = commands.add_parser("adopt", help="a model that ships, as a run to start from or score")
    adopt.add_argument("name", type=run_name, help="of the run to write")
    shipped = ("fewstep-teacher", "fewstep-demo")
    adopt.add_argument("--shipped", default=shipped[0], choices=shipped, help="default the teacher")
    adopt.add_argument("--config", default="teacher", help="of its sizes; default teacher")
    for command in (merge, adopt):
        command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    evaluate = commands.add_parser("eval", help="GenEval's categories, and a Fréchet distance")
    evaluate.add_argument("name", nargs="+", help="of runs")
    evaluate.add_argument(
        "--steps", type=at_least(1), help="default the run's own; a teacher's are 50"
    )
    evaluate.add_argument("--cfg", type=guidance, help="default the run's own: a student's is 1")
    evaluate.add_argument("--recipe", help="quantised so first, as quant's recipe of that name")
    evaluate.add_argument("--sheet", action="store_true", help="draw a sheet as well")
    export = commands.add_parser("export", help="a run's GGUF files, with fewstep.* metadata")
    export.add_argument("name", help="of the run")
    export.add_argument("--models", required=True, type=Path, help="folder to write below")
    export.add_argument(
        "--file",
        type=lambda name: name.removesuffix(".gguf"),
        help="name of the model's file; default fewstep-NAME",
    )
    time = commands.add_parser("time", help="seconds a picture through ComfyUI, runs in turns")
    time.add_argument("name", nargs="+", help="of runs")
    time.add_argument("--turns", type=at_least(1), default=9, help="default 9")
    time.add_argument("--pictures", type=at_least(1), default=1, help="at once; default 1")
    for command in (export, time):
        command.add_argument("--recipe", default="flash-8", help="of the model; default flash-8")
    noise = commands.add_parser("noise", help="how noisy the gradient of stage 2 is")
    noise.add_argument("name", nargs="+", help="of runs, shared and random")
    noise.add_argument("--batches", type=at_least(2), default=16, help="default 16")
    proof = commands.add_parser("shipped", help="score what ships, by ComfyUI and two scorers")
    proof.add_argument(
        "name",
        nargs="*",
        type=lambda name: name.removesuffix(".gguf"),
        help=f"of {' and '.join(shipped)}; default all",
    )
    table = commands.add_parser("table", help="a page, distilled.md, from the folder's logs")
    table.add_argument("--docs", type=Path, help="folder to write to; default beside the logs")
    for command in (merge, evaluate, proof):
        command.add_argument("--captions", type=at_least(12), default=1000, help="default 1000")
    for command in (merge, evaluate):
        command.add_argument(
            "--encoders",
            default="no t5",
            help="both, no t5 (default), zero t5, no clip, zero clip",
        )
    for command in commands.choices.values():
        command.add_argument("--folder", default=run.ROOT / ".train" / "distill", type=Path)
        command.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
        command.add_argument(
            "--threads", type=at_least(0), default=0, help="CPU threads; default all"
        )
    return parser.parse_args()


def add_model_options(stage: argparse.ArgumentParser) -> None:
    group = stage.add_argument_group(
        "a LoRA of any flow model", "--set then sets fields of distill/few_step_lora.py's Plan"
    )
    group.add_argument("--model", type=Path, help="GGUF or safetensors file; the teacher")
    group.add_argument("--text-encoder", type=Path, nargs="+", action="extend", metavar="FILE")
    group.add_argument("--clip-type", default="sd3", help="as in ComfyUI's loaders; default sd3")
    group.add_argument("--vae", type=Path, help="file; for --images")
    group.add_argument("--images", type=Path, help="folder of pictures, captions in .txt beside")
    group.add_argument("--prompts", type=Path, help="file, a prompt a line: the teacher draws")
    group.add_argument(
        "--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="in pixels; default 1024²"
    )
    group.add_argument("--negative", default="", help="prompt that guidance leads away from")
    group.add_argument("--start", type=Path, help="LoRA file to go on from, of the same rank")


def run_name(text: str) -> str:
    if not text or Path(text).name != text or "\\" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a run: one without slashes is")
    return text


def main() -> int:
    """The exit status: 0 done, 1 an error told in a line on stderr, 130 stopped."""
    options = parse_arguments()
    from fewstep.demo.__main__ import prepare

    prepare(options)
    import torch
    from fewstep.distill.loop import TrainingDiverged

    try:
        check_device(options.device)
        act(options)
    except (ValueError, OSError, TrainingDiverged, MemoryError) as error:
        print(f"python -m distill: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "allocate" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"python -m distill: too little memory for this batch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def check_device(name: str) -> None:
    """Raises: ValueError for a device that is not there."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def act(options: argparse.Namespace) -> None:
    given = [name for name in OF_A_MODEL if getattr(options, name, None)]
    if given and not options.model:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} is for a --model FILE; the miniature has its own scenes")
    if getattr(options, "model", None):
        from fewstep.distill import host_run

        host_run.run(options)
        return
    from fewstep.demo.miniature import Miniature
    from fewstep.distill import commands

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes train a --model; the miniature is trained by one")
    getattr(commands, options.command)(options, Miniature())


if __name__ == "__main__":
    sys.exit(main())
