"""How a step's time grows with the picture's tokens, and with how many pictures are drawn at once.

    python -m bench.growth [--peer-gguf CLONE] [--pixels 256,384,512,768] [--batches 1,2,4]

Sides take turns as in `python -m bench`; batches are of the smallest picture. The results go to
bench/results/growth-<device>.json and .md, and two pictures beside them.
"""

import argparse
import tempfile
from pathlib import Path

from . import chart, table
from .__main__ import (
    SIDES,
    TYPES,
    Side,
    add_measuring,
    clone,
    counts,
    keep,
    make_files,
    say,
    setting,
    some,
)

TEXT = 77  # tokens


def tokens(pixels: int) -> int:
    """Of a picture so wide and high, and its text: SD3's latents have 8 pixels, its patches two of
    these.
    """
    return (pixels // 16) ** 2 + TEXT


def measure(options: argparse.Namespace, sides: dict[str, tuple], paths: dict[str, str]) -> list:
    workers = {name: Side(name, options.threads, *given) for name, given in sides.items()}
    for name, worker in workers.items():
        worker(do="load", file=paths["F16" if name == "host" else options.type])
    sizes = options.pixels
    settings = [(size, 1) for size in sizes]
    settings += [(sizes[0], n) for n in options.batches if n > 1]
    rows = []
    for pixels, batch in [settings[0], *settings]:  # the first one warms up
        turns = [
            {n: w(do="step", pixels=pixels, batch=batch)[options.clock] for n, w in workers.items()}
            for _ in range(options.repeats)
        ]
        rows.append({"pixels": pixels, "tokens": tokens(pixels), "batch": batch, "turns": turns})
        say(f"{pixels}², {batch} at once: {table.medians(turns)}")
    for worker in workers.values():
        worker.close()
    return rows[1:]


def series(rows: list[dict], key: str) -> dict[str, dict[float, float]]:
    """Median seconds a picture, by side and by the number under `key`."""
    lines = {}
    for row in rows:
        for name, seconds in table.exact_medians(row["turns"]).items():
            lines.setdefault(name, {})[row[key]] = seconds / row["batch"]
    return lines


def by_tokens(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["batch"] == 1]


def by_batch(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["pixels"] == rows[0]["pixels"]]


def report(result: dict) -> str:
    told = "; ".join(f"{key} {value}" for key, value in result["setting"].items() if value)
    head = ["Picture", "At once", "Tokens", "Side", "A step", "Times ours (least–most)"]
    body = [
        [
            *(f"{row['pixels']}²", str(row["batch"]), str(row["tokens"] * row["batch"])),
            *(table.LABELS[name], f"{seconds:.2f} s", table.against(row, name)),
        ]
        for row in result["rows"]
        for name, seconds in table.exact_medians(row["turns"]).items()
    ]
    return "\n".join([f"# Growth, {result['type']}", "", told, "", *table.rows(head, body)])


def main() -> None:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=about)
    parser.add_argument("--peer-gguf", type=clone, help="a clone of city96/ComfyUI-GGUF")
    parser.add_argument("--type", choices=TYPES, default="Q6_K")
    parser.add_argument("--pixels", type=counts, default=[256, 384, 512, 768])
    parser.add_argument("--batches", type=counts, default=[1, 2, 4])
    parser.add_argument("--leave-out", type=some(*SIDES), default=[], help="sides not to measure")
    add_measuring(parser, repeats=3)
    options = parser.parse_args()
    sides = {"fewstep": (), "host": ()}
    if options.peer_gguf:
        sides["peer-gguf"] = (str(options.peer_gguf.resolve()),)
    sides = {name: given for name, given in sides.items() if name not in options.leave_out}
    result = {"setting": setting(options), "type": options.type}
    with tempfile.TemporaryDirectory() as temporary:
        paths = make_files(options, options.files or temporary, [options.type])
        result["rows"] = measure(options, sides, paths)
    stem = keep(options, f"growth-{result['setting']['device']}", result, report(result))
    draw(result, stem)


def draw(result: dict, stem: Path) -> None:
    for key, rows, below in (
        ("tokens", by_tokens(result["rows"]), "tokens of picture and text"),
        ("batch", by_batch(result["rows"]), "pictures at once"),
    ):
        title = f"Seconds a step takes for a picture, {result['type']}"
        drawn = chart.lines(title, below, series(rows, key))
        stem.with_name(f"{stem.name}-{key}.svg").write_text(drawn)


if __name__ == "__main__":
    main()
