"""What a distilled checkpoint saves: a picture in 4 steps beside the teacher's 50 with guidance.

    python -m bench.distilled [--type Q6_K] [--pixels 256,512] [--files FOLDER]

An SD3.5-Medium-sized GGUF file, CLIP-L, CLIP-G and SD3's VAE, with random weights, through the host
as the nodes use it: text, sampling and VAE of a prompt that is new, in turns, in one process. Both
draw with the same weights, as student and teacher have the same shape; T5 is left out of both. The
results go to bench/results/distilled-<device>.json and .md.
"""

import argparse
import tempfile

from . import table
from .__main__ import TYPES, Side, add_measuring, counts, keep, make_files, say, setting

DRAWN = {  # how it is drawn: steps and CFG
    "teacher": {"steps": 50, "cfg": 4.5},
    "student": {"steps": 4, "cfg": 1.0},
}
PARTS = ("text", "sampling", "VAE")


def measure(options: argparse.Namespace, paths: dict[str, str]) -> list[dict]:
    side, clock, drawn = Side("fewstep", options.threads), options.clock, 0
    side(do="load", file=paths[options.type])
    side(do="load_encoders", files=[paths["CLIP-L"], paths["CLIP-G"]])
    side(do="load_vae", file=paths["VAE"])

    def picture(pixels: int, steps: int, cfg: float) -> dict[str, float]:
        nonlocal drawn
        drawn += 1
        spent = [
            side(do="prompt", text=f"prompt {drawn}", guided=cfg != 1),
            side(do="sample", pixels=pixels, steps=steps, cfg=cfg),
            side(do="decode", pixels=pixels),
        ]
        return dict(zip(PARTS, (each[clock] for each in spent), strict=True))

    rows = []
    for pixels in options.pixels:
        for how in DRAWN.values():
            picture(pixels, 1, how["cfg"])  # warms up
        turns = []
        for _ in range(options.repeats):
            turns.append({name: picture(pixels, **how) for name, how in DRAWN.items()})
            say(f"{pixels}²: {turns[-1]}")
        rows.append({"pixels": pixels, "turns": turns})
    side.close()
    return rows


def report(result: dict) -> str:
    told = "; ".join(f"{key} {value}" for key, value in result["setting"].items() if value)
    head = ["Picture", "Drawn by", "Steps", "CFG", *PARTS, "Whole", "Times student's (least–most)"]
    body = []
    for row in result["rows"]:
        whole = table.of_first(row["turns"], lambda spent: sum(spent.values()))
        for name, how in DRAWN.items():
            parts = table.exact_medians([turn[name] for turn in row["turns"]])
            times = [f"{parts[part]:.2f} s" for part in PARTS]
            ratio = "" if name == "student" else table.ratio(whole, name, "student")
            times += [f"{table.exact_medians(whole)[name]:.2f} s", ratio]
            body.append([f"{row['pixels']}²", name, str(how["steps"]), f"{how['cfg']:g}", *times])
    title = f"# Teacher and student, SD3.5-Medium-sized, {result['type']}"
    return "\n".join([title, "", told, "", *table.rows(head, body)])


def main() -> None:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.distilled", description=about)
    parser.add_argument("--type", choices=TYPES, default="Q6_K", help="of the matrices")
    parser.add_argument("--pixels", type=counts, default=[256, 512])
    add_measuring(parser, repeats=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        paths = make_files(options, options.files or temporary, [options.type])
        result = {"setting": setting(options), "type": options.type}
        result["rows"] = measure(options, paths)
    keep(options, f"distilled-{result['setting']['device']}", result, report(result))


if __name__ == "__main__":
    main()
