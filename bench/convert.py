"""How long a whole file takes to quantise, and how much memory: against `dd` and ggml's arithmetic.

    python -m bench.convert GGML [--types Q6_K,Q4_K] [--threads 2] [--repeats 3] [--files FOLDER]

The source is an SD3.5-Medium-sized bf16 file of random weights (5 GB). In turns: `dd` copies it and
waits for the disk; ggml's C (see `bench.quantize`) packs some of its weights, whose time is scaled
to all of them; and `python -m quant convert` converts it, as it is and with a LoRA baked in, each
in a process of its own whose peak memory the system tells. Last, FewStep Quantize's function on the
loaded MODEL. Needs 20 GB of disk; the results go to bench/results/convert.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import gguf
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.__main__ import RESULTS, Side
from bench.machine import machine
from bench.quantize import COLS, ggml_side
from bench.quantize import seconds as clocked
from quant.plan import make_plan
from quant.recipes import recipe_or_type
from quant.sources import open_source
from tests.golden.ggml import Ggml

SAMPLE = 2**25  # weights that ggml packs
RANK = 16


def ggml_seconds(ggml: Ggml, qtype, weights: int, threads: int) -> float:
    """ggml's time for so many weights on so many threads."""
    x = np.random.default_rng(0).normal(0, 0.02, (SAMPLE // COLS, COLS)).astype(np.float32)
    with ThreadPoolExecutor(threads) as pool:
        run = ggml_side(ggml, pool, threads, x, qtype, None)
        return clocked(run, time.perf_counter) * weights / SAMPLE


def copy_seconds(source: Path, target: Path) -> float:
    command = ["dd", f"if={source}", f"of={target}", "bs=4M", "conv=fsync", "status=none"]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    spent = time.perf_counter() - start
    target.unlink()
    return spent


def convert_run(source: Path, target: Path, qtype: str, threads: int, *more: str) -> dict:
    """Seconds and peak bytes of the command, as a user runs it."""
    command = [sys.executable, "-m", "quant", "convert", str(source), str(target), "--type", qtype]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    process = subprocess.Popen([*command, *more], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    spent = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{command} failed")
    target.unlink()
    return {"seconds": spent, "peak": usage.ru_maxrss * 1024}


def lora_file(source: Path, folder: Path) -> Path:
    """A rank-16 LoRA on every matrix of the transformer's blocks."""
    path, tensors = folder / f"lora-{RANK}.safetensors", {}
    with safe_open(source, "pt") as file:
        for name in file.keys():  # noqa: SIM118  not a dict
            shape = file.get_slice(name).get_shape()
            if name.startswith("joint_blocks.") and len(shape) == 2:
                layer = f"diffusion_model.{name.removesuffix('.weight')}"
                up, down = torch.randn(shape[0], RANK), torch.randn(RANK, shape[1])
                tensors[f"{layer}.lora_down.weight"] = down.half()
                tensors[f"{layer}.lora_up.weight"] = up.half() / 1000
    save_file(tensors, path)
    return path


def node_run(source: Path, target: Path, qtype: str, threads: int) -> dict:
    worker = Side("fewstep", threads)
    worker(do="load", file=str(source))
    answer = worker(do="quantise", file=str(target), qtype=qtype)
    worker.close()
    target.unlink()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convert", description=__doc__.splitlines()[0]
    )
    parser.add_argument("ggml", type=Path, help="ggml's source folder, or a shared library of it")
    parser.add_argument("--types", type=lambda text: text.split(","), default=["Q6_K", "Q4_K"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--files", help="a folder where the source stays for the next run")
    options = parser.parse_args()
    result = {"setting": {"load average before": round(os.getloadavg()[0], 1)} | machine()}
    result["setting"] |= {"threads": options.threads, "repeats": options.repeats}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.files or temporary)
        worker = Side("fewstep", options.threads)
        source = Path(worker(do="source", folder=str(folder))["path"])
        worker.close()
        result["source"] = {"bytes": source.stat().st_size, "largest tensor": largest(source)}
        result["rows"] = [measure(options, source, folder, qtype) for qtype in options.types]
    (RESULTS / "convert.json").write_text(json.dumps(result, indent=1) + "\n")


def largest(source: Path) -> int:
    """Bytes."""
    return max(tensor.nbytes for tensor in open_source(source).tensors.values())


def measure(options, source: Path, folder: Path, qtype: str) -> dict:
    ggml, target, lora = Ggml(options.ggml), folder / "out.gguf", lora_file(source, folder)
    kind, threads = gguf.GGMLQuantizationType[qtype], options.threads
    convert_run(source, target, qtype, threads)  # compiles the kernels
    plan = make_plan(open_source(source), recipe_or_type(qtype))
    weights = sum(choice.source.numel for choice in plan.choices if choice.qtype == kind)
    turns = []
    for _ in range(options.repeats):
        turn = {"dd": copy_seconds(source, target)}
        turn["ggml"] = ggml_seconds(ggml, kind, weights, threads)
        turn["convert"] = convert_run(source, target, qtype, threads)
        turn["lora"] = convert_run(source, target, qtype, threads, "--lora", f"{lora}:0.7")
        turn["unmeasured"] = convert_run(source, target, qtype, threads, "--no-measure")
        turn["node"] = node_run(source, target, qtype, threads)
        for name in ("convert", "lora", "unmeasured", "node"):
            turn[name]["of dd and ggml"] = turn[name]["seconds"] / (turn["dd"] + turn["ggml"])
        print(json.dumps({"type": qtype} | turn), flush=True)
        turns.append(turn)
    lora.unlink()
    ratio = median(turn["convert"]["of dd and ggml"] for turn in turns)
    return {"type": qtype, "weights": weights, "median of dd and ggml": ratio, "turns": turns}


if __name__ == "__main__":
    main()
