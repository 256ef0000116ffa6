"""What bounds dequantising on GPUs, counted from the machine code that Triton makes for them.

    python -m bench.sass [--out FOLDER]

Needs no GPU, and is no measurement: the least time in which a GPU's units execute a kernel's
instructions (it has no loop, so each counts once), over the time in which its memory copies the
blocks read and the weights written, in bfloat16, at 90 % of its peak. Waiting comes on top. Where
LoRAs are added (types of 256 weights a block: others' kernels have a loop), what their factors take
of the caches and conflicts of banks are left out. What is counted is sure; rates and clocks are
assumed, on the slow side where sources differ: the rates of arithmetic are those of NVIDIA's guide
to CUDA ("Throughput of Native Arithmetic Instructions"), as others quote it, and which unit
executes what is what others measured; an L1 cache looks up four lines a clock
(forums.developer.nvidia.com/t/49571, of Volta). Clocks are the rated boost, an H200's lower: 1.7
GHz. The results go to bench/results/sass.json and .md.
"""

import argparse
import importlib
import re
from collections import Counter, namedtuple
from datetime import date
from itertools import product
from pathlib import Path

from . import table
from .__main__ import RESULTS, keep

COPIES = 0.9  # of a memory's peak
RANKS = 64  # of LoRAs
LINE, LINES = 128, 4  # bytes of a line of the L1 cache, lines a clock
INSTRUCTION = re.compile(r"^\S+\t(?:@!?U?P\w+ )?([A-Z]\w+)(\S*)", re.M)
UNITS = {  # unit -> how its instructions start; they and all others have to be issued, too
    "float": r"FADD|FMUL|FFMA",
    "multiply": r"IMAD|HADD2|HFMA2",
    "integer": r"V?IADD|LOP3|SHF|PRMT|LEA|SGXT|F?SEL|MOV|ISETP|PLOP3|V?IMNMX|I2FP",
    "pack": r"F2FP",
    "convert": r"I2F\b|F2I|F2F\b|MUFU|POPC",
    "memory": r"(LD|ST)[GSL]",
}
# Gigahertz; terabytes a second; a clock and multiprocessor: instructions of a warp on floats, and
# products of bfloat16 by tensor cores, summed in float32, as the makers' peak rates give them.
Gpu = namedtuple(
    "Gpu", "capability multiprocessors gigahertz terabytes products floats", defaults=[4]
)
GPUS = {
    "A100": Gpu(80, 108, 1.41, 2.039, 1024, floats=2),
    "RTX 4090": Gpu(89, 128, 2.52, 1.008, 256),
    "H200": Gpu(90, 132, 1.7, 4.8, 2048),
    "RTX 5090": Gpu(120, 170, 2.41, 1.792, 256),
}


def count(sass: str, lines: float, tabled: bool) -> Counter:
    """Instructions of a warp by unit, memory's in clocks, where each reaches into so many lines;
    those that look up a table, which is one line, load 32 bits.
    """
    counted = Counter()
    for name, suffix in INSTRUCTION.findall(sass[: sass.rindex("EXIT")] + "EXIT"):
        unit = next((unit for unit, starts in UNITS.items() if re.match(starts, name)), None)
        clocks = {".128": 4, ".64": 2}.get(suffix[suffix.rfind(".") :], 1)
        clocks = clocks if tabled and suffix == ".E" else max(clocks, lines / LINES)
        counted[unit] += clocks if unit == "memory" else 1
        counted["issue"] += 1
    return counted


def bound(
    counted: Counter, weights: float, octets: float, gpu: Gpu, ranks: int = 0
) -> dict[str, float]:
    """Each unit's time over that of the bytes, for a warp of so many weights of `octets` each, to
    each of which so many products are added.
    """
    clocks = {
        "issue": counted["issue"] / 4,
        "integer": counted["integer"] / 2 + counted["pack"],
        "float": (counted["float"] + counted["multiply"]) / gpu.floats,
        "multiply": counted["multiply"] / 2,
        "convert": counted["convert"] * 2,
        "memory": counted["memory"],
        "tensor": weights * ranks / gpu.products,
    }
    clock = 1 / (gpu.multiprocessors * gpu.gigahertz * 1e9)
    needed = weights * octets / (gpu.terabytes * 1e12 * COPIES)
    return {unit: n * clock / needed for unit, n in clocks.items()}


def measure() -> list[dict]:
    """A row for each type and GPU, and one with LoRAs for each large type and GPU."""
    dequant = importlib.import_module("fewstep.quant.triton_dequant")
    merged = importlib.import_module("fewstep.quant.triton_merged")
    built = importlib.import_module("fewstep.tests.quant.built")
    rows = []
    for (qtype, (_, lanes)), ranks in product(dequant.FORMATS.items(), (0, RANKS)):
        size, width = dequant.GGML_QUANT_SIZES[qtype]
        weights = dequant.rows(size, lanes) * size // dequant._WARPS
        blocks = 32 * 8 // lanes  # that a warp reaches into at a time: eight lanes a thread
        lines = min(blocks, blocks * width / LINE + 1)
        if ranks and size < merged._COLUMNS:
            continue
        for name, gpu in GPUS.items():
            target = "cuda", gpu.capability, 32
            if ranks:
                made, lines = built.merge(merged, dequant, qtype, ranks, target), LINES
                weights = merged._ROWS * size // made.metadata.num_warps
            else:
                made = built.dequantize(dequant, qtype, target)
            sass = made.asm["sass"]
            counted = count(sass, lines, qtype in dequant._WITH_LEVELS)
            row = {"type": qtype.name, "gpu": name, "ranks": ranks}
            row["instructions"] = counted["issue"] * 32 / weights
            row["registers"] = 1 + max(map(int, re.findall(r"\bR(\d+)", sass)))
            row["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", sass))
            rows.append(row | {"bounds": bound(counted, weights, width / size + 2, gpu, ranks)})
    return rows


def report(result: dict) -> str:
    about = (
        f"Counted from what Triton {result['triton']} makes ({result['date']}), not measured: the "
        "busiest unit's time over that of the bytes (instructions a weight, registers, spills)."
    )
    head = ["# Dequantising to bfloat16 on GPUs", "", about, ""]
    lora = ["", f"## With LoRAs of {RANKS} ranks in the weights", ""]
    return "\n".join([*head, *_table(result, 0), *lora, *_table(result, RANKS)])


def _table(result: dict, ranks: int) -> list[str]:
    rows = [row for row in result["rows"] if row["ranks"] == ranks]
    body = {row["type"]: [row["type"]] for row in rows}
    for row in rows:
        unit = max(row["bounds"], key=row["bounds"].get)
        numbers = f"{row['instructions']:.1f}, {row['registers']}, {row['spills']}"
        body[row["type"]].append(f"{row['bounds'][unit]:.2f} {unit} ({numbers})")
    return table.rows(["Type", *GPUS], list(body.values()))


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.sass", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        parser.error("needs triton: on Linux, `pip install triton` (`run.py test` does)")
    importlib.import_module("run").load_pack("fewstep")
    about = {"triton": triton.__version__, "date": date.today().isoformat()}
    result = about | {"rows": measure()}
    keep(options, "sass", result, report(result))


if __name__ == "__main__":
    main()
