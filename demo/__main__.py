"""Make the model that ships, and measure it: `python -m demo train | export | score | quantise`."""

import argparse
import logging
import sys
from pathlib import Path

import run

run.load_pack()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train VAE and flow model, then write the GGUF files")
    export = commands.add_parser("export", help="write the GGUF files from what is trained so far")
    score = commands.add_parser("score", help="draw captions kept from training, and score them")
    quantise = commands.add_parser(
        "quantise", help="the model at 16, 8, 6 and 4 bits: docs/quantised.md and its picture"
    )
    for command in (train, export, score, quantise):
        command.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
        command.add_argument("--threads", type=int, default=0, help="CPU threads; default all")
        command.add_argument("--models", type=Path, help="folder of the GGUF files")
    for command in (train, export):
        command.add_argument("--folder", default=run.ROOT / ".train", type=Path)
    train.add_argument("--minutes", type=float, help="wall clock in all; default 120")
    train.add_argument("--samples", type=int, help="budget in samples of the flow model instead")
    train.add_argument(
        "--only",
        choices=("decoder", "encoder", "teacher", "guided", "reflow", "reflow2"),
        help="a single stage",
    )
    train.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    score.add_argument("--captions", type=int, default=200, help="of each kind; default 200")
    score.add_argument("--steps", type=int, help="euler steps; default the checkpoint's")
    score.add_argument("--shift", type=float, help="of the schedule; default the checkpoint's")
    score.add_argument("--cfg", type=float, default=1.0, help="guidance; default 1, none")
    score.add_argument("--kinds", nargs="+", default=["single", "pair", "count"])
    score.add_argument("--seen", action="store_true", help="captions of the training side instead")
    score.add_argument(
        "--sheet", type=Path, help="PNG to draw the first pictures of each kind into"
    )
    quantise.add_argument("--captions", type=int, default=200, help="of each kind; default 200")
    quantise.add_argument("--docs", default=run.ROOT / "docs", type=Path, help="folder to write to")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> None:
    """Make ComfyUI importable; whether it may look for a GPU must be told before its import."""
    from fewstep.tests.comfy_host import add_stand_ins

    sys.path.insert(0, str(run.comfyui_folder()))
    add_stand_ins(cpu=options.device == "cpu")
    import torch
    from comfy.cli_args import args

    args.cpu = options.device == "cpu"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
    logging.getLogger("fewstep").setLevel(logging.INFO)  # of ComfyUI only what is amiss
    if options.threads:
        torch.set_num_threads(options.threads)


def main() -> None:
    options = parse_arguments()
    prepare(options)
    from fewstep.demo import commands

    getattr(commands, options.command)(options)


if __name__ == "__main__":
    main()
