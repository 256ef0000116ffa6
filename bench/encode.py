"""How fast a T5-XXL in GGUF reads a prompt, and how fast its file's header is read.

    python -m bench.encode [--peer-gguf CLONE] [--type Q4_K] [--files FOLDER]

Sides take turns, each in a process of its own, as in `python -m bench`. The header, with its
tokenizer of 32128 words, is read by `quant.GGUFFile`, alone and with the words, and by gguf-py's
GGUFReader. The results go to bench/results/encode.md and .json.
"""

import argparse
import tempfile
import time

from gguf import GGUFReader

from . import table
from .__main__ import TYPES, Side, add_measuring, clone, count, keep, setting

WORDS = "tokenizer.ggml.tokens"


def header_times(path: str, repeats: int) -> list[dict[str, float]]:
    """Seconds, in turns."""
    from quant import GGUFFile  # as `python -m quant` has it, without ComfyUI

    ways = {
        "fewstep": lambda: GGUFFile(path),
        "FewStep, words read": lambda: GGUFFile(path).metadata[WORDS],
        "gguf-py": lambda: GGUFReader(path),
    }
    turns = []
    for _ in range(repeats):
        turn = {}
        for name, read in ways.items():
            start = time.perf_counter()
            read()
            turn[name] = time.perf_counter() - start
        turns.append(turn)
    return turns


def encode_times(options: argparse.Namespace, path: str) -> list[dict[str, float]]:
    sides = {"fewstep": Side("fewstep", options.threads)}
    if options.peer_gguf:
        clone = str(options.peer_gguf.resolve())
        sides["peer-gguf"] = Side("peer-gguf", options.threads, clone)
    for side in sides.values():
        side(do="load_encoder", file=path)
    turns = [
        {
            name: side(do="encode", tokens=options.tokens)[options.clock]
            for name, side in sides.items()
        }
        for _ in range(options.repeats + 1)
    ]
    for side in sides.values():
        side.close()
    return turns[1:]


def report(result: dict) -> str:
    told = "; ".join(f"{key} {value}" for key, value in result["setting"].items() if value)
    return "\n".join(
        [
            *("# A T5-XXL", "", told, ""),
            *(f"## Encoding {result['tokens']} tokens, {result['type']}", ""),
            *compared(result["encode"], 1, "s"),
            *("", "## Reading the header", ""),
            *compared(result["header"], 1e3, "ms"),
        ]
    )


def compared(turns: list[dict[str, float]], factor: float, unit: str) -> list[str]:
    body = []
    for name, time_ in table.exact_medians(turns).items():
        ratio = "" if name == table.OURS else table.ratio(turns, name, table.OURS)
        body.append([table.LABELS.get(name, name), f"{factor * time_:.3g} {unit}", ratio])
    return table.rows(["Side", "Time", "Times ours (least–most)"], body)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.encode", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--peer-gguf", type=clone, help="a clone of city96/ComfyUI-GGUF")
    parser.add_argument("--type", choices=TYPES, default="Q4_K", help="of the T5's matrices")
    parser.add_argument("--tokens", type=count, default=77)
    add_measuring(parser, repeats=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        maker = Side("fewstep", options.threads)
        path = maker(do="encoder_file", folder=options.files or temporary, type=options.type)[
            "path"
        ]
        maker.close()
        result = {"setting": setting(options), "type": options.type, "tokens": options.tokens}
        result["header"] = header_times(path, options.repeats)
        result["encode"] = encode_times(options, path)
    keep(options, "encode", result, report(result))


if __name__ == "__main__":
    main()
