"""What `effort="high"` saves on real weights against what ggml writes, and how fast it is.

    python -m bench.effort [MODEL …] [--limit 4194304] [--threads 2]

MODEL is a .gguf or .safetensors file with weights of 16 bits or more; those of the demo model are
taken if none is named. For each type and each kind of importance: the sum of importance · squared
error, and the root mean square error, as a fraction of ggml's. Importances are made up, since none
come with the files: none, an even spread, and one as skewed as activations often are. The results
go to bench/results/effort.json.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import quant
from bench.machine import machine
from quant.effort import TYPES
from quant.sources import open_source

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "effort.json"
DEMO = sorted((ROOT.parent / "demo" / "models").glob("*/*.gguf"))


def matrices(path: Path, limit: int) -> Iterator[Tensor]:
    """(rows, cols) float32, cols a multiple of 256, up to about `limit` weights in all."""
    for tensor in open_source(path).tensors.values():
        if len(tensor.shape) == 2 and tensor.shape[1] % 256 == 0 and limit > 0:
            x = tensor.read(0, tensor.shape[0])
            limit -= x.numel()
            yield x


def importances(cols: int) -> Iterator[tuple[str, Tensor | None]]:
    generator = torch.Generator().manual_seed(cols)
    yield "none", None
    yield "even", torch.rand(cols, generator=generator) + 0.5
    yield "skewed", torch.randn(cols, generator=generator) ** 4 + 1e-3


def error(x: Tensor, qtype, importance: Tensor | None, effort: str) -> tuple[float, float]:
    """The weighted sum of squared errors, and the seconds taken."""
    start = time.perf_counter()
    blocks = quant.quantize(x, qtype, importance, effort)
    seconds = time.perf_counter() - start
    squares = (quant.dequantize(blocks, qtype, x.shape) - x).double().square()
    return float((squares * (1 if importance is None else importance)).sum()), seconds


def compare(weights: list[Tensor]) -> Iterator[dict]:
    for qtype in sorted(TYPES):
        for kind, _ in importances(1):
            totals = dict.fromkeys(("ggml", "high"), (0.0, 0.0))
            for x in weights:
                importance = dict(importances(x.shape[1]))[kind]
                for effort, before in totals.items():
                    found = error(x, qtype, importance, effort)
                    totals[effort] = before[0] + found[0], before[1] + found[1]
            squares = totals["high"][0] / totals["ggml"][0]
            speed = sum(x.numel() for x in weights) / totals["high"][1] / 1e6
            row = {"type": qtype.name, "importance": kind, "squared error": round(squares, 4)}
            yield row | {"rmse": round(squares**0.5, 4), "million weights/s": round(speed, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.effort", description=__doc__.splitlines()[0]
    )
    parser.add_argument("models", type=Path, nargs="*", default=DEMO)
    parser.add_argument("--limit", type=int, default=2**22, help="weights taken of each model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weights = [x for path in options.models for x in matrices(path, options.limit)]
    for qtype in TYPES:
        quant.quantize(weights[0][:2], qtype, None, "high")  # compile
    rows = []
    for row in compare(weights):
        rows.append(row)
        print(*row.values(), flush=True)
    setting = {"models": [path.name for path in options.models], "threads": options.threads}
    setting |= {"weights": sum(x.numel() for x in weights), **machine()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"of ggml's": True, **setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
