"""How fast this project is beside its peers, on the same file, on the same machine, in one run.

    python -m bench [--peer-gguf CLONE] [--types Q6_K,Q4_K] [--pixels 256,512] [--out FOLDER]

Measured are the first picture (file to first step, and peak memory), a step, LoRAs, dequantising.
Sides: this project; ComfyUI itself with the model unquantised; a clone of city96/ComfyUI-GGUF; and
stable-diffusion.cpp, if the package stable-diffusion-cpp-python is installed. Each runs in a
process of its own (`worker.py`), and they take turns, so that a busy spell of the machine meets
them all; where others keep it busy, take `--threads 1 --clock cpu`. A ratio is taken within a turn:
median, least and most of them. Needs about 9 GB of disk, and 20 GB of memory with all sides; runs
on the CPU, or on the GPU if there is one.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from . import cache, chart, table
from .machine import processor

RESULTS = Path(__file__).parent / "results"
LORA_COUNTS = (0, 1, 4, 8)
TYPES = ("Q6_K", "Q4_K")  # that random blocks are made of
SIDES = ("fewstep", "host", "runtime", "peer-gguf", "cpp")


class Side:
    """A worker process: `side(do="step", pixels=256)` is its answer."""

    def __init__(self, name: str, threads: int, *arguments: str):
        command = [sys.executable, "-m", "bench.worker", name, str(threads), *arguments]
        self.name, self.log = name, tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            cwd=RESULTS.parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def __call__(self, **request) -> dict:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            said = self.log.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{self.name} ended on {request}:\n{said}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    options = arguments()
    sides = {"fewstep": (), "host": ()}
    if options.runtime:
        sides["runtime"] = (options.runtime,)
    if options.peer_gguf:
        sides["peer-gguf"] = (str(options.peer_gguf.resolve()),)
    if importlib.util.find_spec("stable_diffusion_cpp"):
        sides["cpp"] = None  # its files, when they are made
    sides = {name: given for name, given in sides.items() if name not in options.leave_out}
    result = {"setting": setting(options), "first": [], "steps": [], "loras": []}
    with tempfile.TemporaryDirectory() as temporary:
        paths = make_files(options, options.files or temporary, options.types)
        if "cpp" in sides:
            sides["cpp"] = tuple(paths[part] for part in ("CLIP-L", "CLIP-G", "VAE"))
        result["rates"] = rates(options)
        for qtype in options.types:
            measure_first(options, sides, paths, qtype, result)
            measure(options, sides, paths, qtype, result)
    result["setting"]["load"] = [*result["setting"]["load"], os.getloadavg()[0]]
    stem = keep(options, f"speed-{result['setting']['device']}", result, table.report(result))
    stem.with_suffix(".svg").write_text(chart.bars(result))


def keep(options: argparse.Namespace, name: str, result: dict, text: str) -> Path:
    """Print a report, and write it and what it tells of; their path without the ending."""
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / name
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    return stem


def add_measuring(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Options of every benchmark whose sides take turns."""
    parser.add_argument("--repeats", type=count, default=repeats)
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    clock_help = "cpu: processor time of all threads, for a busy machine (with --threads 1)"
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help=clock_help)
    parser.add_argument("--files", help="a folder where the model files stay for the next run")
    parser.add_argument("--out", type=Path, default=RESULTS)


def some(*choices: str) -> Callable[[str], list[str]]:
    """For argparse: some of the choices, with commas between."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in choices]:
            told = ", ".join(choices)
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of these: {told}")
        return names

    return read


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def counts(text: str) -> list[int]:
    return [count(word) for word in text.split(",")]


def clone(text: str) -> Path:
    if not (Path(text) / "nodes.py").is_file():
        where = "git clone https://github.com/city96/ComfyUI-GGUF"
        raise argparse.ArgumentTypeError(f"{text} is no clone of ComfyUI-GGUF: {where}")
    return Path(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--peer-gguf", type=clone, help="a clone of city96/ComfyUI-GGUF")
    parser.add_argument("--types", type=some(*TYPES), default=TYPES, help=", ".join(TYPES))
    runtime_help = "measure the loader's `runtime` too"
    parser.add_argument("--runtime", choices=["int8", "fp8", "mxfp8", "nvfp4"], help=runtime_help)
    parser.add_argument("--pixels", type=counts, default=[256, 512], help="sides of the picture")
    first_help = "how often each side starts anew for a first picture, cold and warm; 0: never"
    parser.add_argument("--first", type=int, default=3, help=first_help)
    parser.add_argument("--no-loras", action="store_true", help="do not measure LoRAs")
    parser.add_argument(
        "--leave-out", type=some(*SIDES), default=[], help=f"not to measure of {', '.join(SIDES)}"
    )
    add_measuring(parser, repeats=5)
    return parser.parse_args()


def make_files(options: argparse.Namespace, folder: str, types: list[str]) -> dict[str, str]:
    worker = Side("fewstep", options.threads)
    paths = worker(do="files", folder=folder, types=types)["paths"]
    worker.close()
    return paths


def rates(options: argparse.Namespace) -> dict[str, list[float]]:
    worker = Side("fewstep", options.threads)
    weights = 2**27 if torch.cuda.is_available() else 2**23
    answer = worker(do="rates", weights=weights, repeats=options.repeats, clock=options.clock)
    worker.close()
    return answer["rates"]


def measure_first(options, sides, paths, qtype, result) -> None:
    """From the file to the first step, each side in a process that starts anew; adds to `result`.

    Cold: nothing of the files is in the system's cache, as on the first picture of the day.
    """
    for size in options.pixels:
        for cold in (True, False) if cache.CAN_FORGET else (False,):
            start = (options, sides, paths, qtype, size, cold)
            if turns := [first_turn(*start) for _ in range(options.first)]:
                row = {"type": qtype, "pixels": size, "cold": cold, "turns": turns}
                result["first"].append(row)
                seconds = table.medians(table.of_first(turns, table.first_picture))
                say(f"{qtype} {size}², first, {'cold' if cold else 'warm'}: {seconds}")


def first_turn(options, sides, paths, qtype, size: int, cold: bool) -> dict[str, dict]:
    turn = {}
    for name, given in sides.items():
        worker = Side(name, options.threads, *given)
        file = paths["F16" if name == "host" else qtype]
        for path in (file, *(given if name == "cpp" else ())):
            (cache.forget if cold else cache.remember)(path)
        turn[name] = {"load": worker(do="load", file=file)[options.clock]}
        turn[name]["step"] = worker(do="step", pixels=size)[options.clock]
        turn[name] |= worker(do="memory")
        worker.close()
    return turn


def measure(options, sides, paths, qtype, result) -> None:
    """All sides on one type of file, in turns; adds rows to `result`."""
    pixels, clock = options.pixels, options.clock
    for size in pixels:
        workers = {}
        for name, given in sides.items():
            workers[name] = Side(name, options.threads, *given)
            workers[name](do="load", file=paths["F16" if name == "host" else qtype])
        turns = [take_turn(workers, size, clock) for _ in range(options.repeats + 1)]
        result["steps"].append({"type": qtype, "pixels": size, "turns": turns[1:]})
        say(f"{qtype} {size}²: {table.medians(turns[1:])}")
        for name in ("fewstep", "peer-gguf"):
            if name in workers and size == pixels[-1] and not options.no_loras:
                turns = [lora_turn(workers[name], size, clock) for _ in range(options.repeats)]
                row = {"type": qtype, "pixels": size, "side": name, "turns": turns}
                result["loras"].append(row)
                say(f"{qtype} LoRAs, {name}: {table.medians(turns)}")
        for worker in workers.values():
            worker.close()


def take_turn(workers: dict[str, Side], pixels: int, clock: str) -> dict[str, float]:
    return {name: w(do="step", pixels=pixels)[clock] for name, w in workers.items()}


def lora_turn(worker: Side, pixels: int, clock: str) -> dict[str, float]:
    times = {}
    for count in LORA_COUNTS:
        worker(do="loras", count=count)
        for _ in range(2):  # the host loads patches, then memory settles
            worker(do="step", pixels=pixels)
        times[str(count)] = worker(do="step", pixels=pixels)[clock]
    return times


def setting(options: argparse.Namespace) -> dict:
    """Machine and versions, without names that tell whose machine it is."""
    cuda = torch.cuda.is_available()
    told = {
        "device": "cuda" if cuda else "cpu",
        "processor": torch.cuda.get_device_name() if cuda else processor(),
        "threads": options.threads,
        "runtime": getattr(options, "runtime", None),
        "repeats": options.repeats,
        "starts": getattr(options, "first", None),
        "clock": options.clock,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "load": [os.getloadavg()[0]],
    }
    if getattr(options, "peer_gguf", None):
        command = ["git", "-C", str(options.peer_gguf), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
        told["ComfyUI-GGUF"] = done.stdout.strip()
    if importlib.util.find_spec("stable_diffusion_cpp"):
        from importlib.metadata import version

        told["stable-diffusion-cpp-python"] = version("stable-diffusion-cpp-python")
    return told


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
