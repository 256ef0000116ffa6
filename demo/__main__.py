"""`python -m demo train`, `python -m demo score`: make the model that ships, and measure it."""

import argparse
import logging
import sys
from pathlib import Path

import run

pack = run.load_pack()


def prepare_host(device: str) -> None:
    """Make ComfyUI importable; on the CPU it must be told before its first import."""
    sys.path.insert(0, str(run.comfyui_folder()))
    from comfy.cli_args import args

    args.cpu = device == "cpu"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train VAE and flow model, then write the GGUF files")
    train.add_argument("--minutes", type=float, help="wall clock in all; default 105")
    train.add_argument("--samples", type=int, help="budget in samples of the flow model instead")
    train.add_argument("--only", choices=("decoder", "encoder", "teacher"), help="a single stage")
    train.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    for command in (train,):
        command.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
        command.add_argument("--threads", type=int, default=0, help="CPU threads; default all")
        command.add_argument("--folder", default=run.ROOT / ".train", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    prepare_host(options.device)
    import torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    from fewstep.demo import recipe

    minutes = options.minutes
    if minutes is None and options.samples is None:
        minutes = 105
    stages = [options.only] if options.only else list(recipe.STAGES)
    config = recipe.TeacherConfig(compiled=options.compile)
    recipe.train_stages(options.folder, stages, minutes, options.samples, options.device, config)


if __name__ == "__main__":
    main()
