"""Quantising speed of ours and of ggml's C, on the same cores in one run, taking turns.

    python -m bench.quantize GGML [--threads 2] [--size 16777216] [--repeats 5] [--cpu]

GGML is ggml's source folder or a shared library of it: `tests/golden/ggml.py` says where to get
one. Both sides split the rows over the same number of threads. Each number is the median of the
repeats; the results go to bench/results/quantize.json. On a machine that others use as well, --cpu
counts the processor's time of all threads instead of the clock's. Memory is allocated before that
starts; ours includes looking for NaN.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import quant
from bench.machine import machine
from quant.codebook import NEED_IMPORTANCE
from tests.golden.ggml import Ggml

RESULTS = Path(__file__).parent / "results" / "quantize.json"
COLS = 4096


def ggml_side(
    ggml: Ggml, pool: ThreadPoolExecutor, threads: int, x: np.ndarray, qtype: int, importance
) -> Callable[[], None]:
    out = ggml.quantize(x, qtype, importance)  # for its size, and to build ggml's tables
    parts = [slice(len(x) * i // threads, len(x) * (i + 1) // threads) for i in range(threads)]

    def run() -> None:
        list(pool.map(lambda p: ggml.quantize_into(out[p], x[p], qtype, importance), parts))

    return run


def our_side(x: np.ndarray, qtype: int, importance) -> Callable[[], None]:
    weights, part = (
        torch.from_numpy(x),
        None if importance is None else torch.from_numpy(importance),
    )
    out = quant.quantize(weights, qtype, part)  # compile

    def run() -> None:
        quant.quantize(weights, qtype, part, out=out)

    return run


def seconds(run: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def compare(options: argparse.Namespace) -> list[dict]:
    ggml, rng = Ggml(options.ggml), np.random.default_rng(0)
    clock = time.process_time if options.cpu else time.perf_counter
    x = rng.normal(size=(options.size // COLS, COLS)).astype(np.float32) * np.float32(0.02)
    rows = []
    with ThreadPoolExecutor(options.threads) as pool:
        for qtype in quant.writable_types():
            for weighted in (False, True):
                if not weighted and qtype in NEED_IMPORTANCE:
                    continue
                importance = rng.random(COLS).astype(np.float32) if weighted else None
                theirs = ggml_side(ggml, pool, options.threads, x, qtype, importance)
                ours = our_side(x, qtype, importance)
                times = np.array(
                    [(seconds(theirs, clock), seconds(ours, clock)) for _ in range(options.repeats)]
                )
                them, us = (x.size / 1e6 / np.median(times, axis=0)).tolist()
                row = {"type": qtype.name, "importance": weighted, "ggml": them, "ours": us}
                rows.append(row | {"ratio": us / them})
                note = " with importance" if weighted else ""
                print(f"{qtype.name + note:24} {them:8.1f} {us:8.1f} {us / them:6.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quantize", description=__doc__.splitlines()[0]
    )
    parser.add_argument("ggml", type=Path, help="ggml's source folder, or a shared library of it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=2**24, help="weights in the matrix")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="count the processor's time, per core")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = {"load average before": round(os.getloadavg()[0], 1)} | machine()
    print(f"{'million weights/s':24} {'ggml':>8} {'ours':>8} {'ratio':>6}")
    rows = compare(options)
    setting |= {"threads": options.threads, "weights": options.size, "repeats": options.repeats}
    setting["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "")  # do torch's threads spin
    setting["clock"] = "processor time of all threads" if options.cpu else "wall"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"unit": "million weights/s", **setting, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
