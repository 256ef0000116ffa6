"""How fast FewStep Load VAE's VAE draws and reads a picture, beside ComfyUI's own Load VAE.

    python -m bench.decode [--pixels 256,512] [--files FOLDER]

One file of SD3's VAE with random weights in float16; sides take turns, each in a process of its
own, as in `python -m bench`. The results go to bench/results/decode-<device>.json and .md.
"""

import argparse
import tempfile

from . import table
from .__main__ import Side, add_measuring, keep, say, setting, words

WAYS = {"decode": "latent to picture", "encode_picture": "picture to latent"}


def measure(options: argparse.Namespace, path: str) -> list[dict]:
    sides = {name: Side(name, options.threads) for name in ("fewstep", "host")}
    for side in sides.values():
        side(do="load_vae", file=path)
    rows = []
    for pixels in map(int, options.pixels):
        for way in WAYS:
            turns = [
                {name: side(do=way, pixels=pixels)[options.clock] for name, side in sides.items()}
                for _ in range(options.repeats + 1)
            ]
            rows.append({"pixels": pixels, "way": way, "turns": turns[1:]})
            say(f"{pixels}², {WAYS[way]}: {table.medians(turns[1:])}")
    for side in sides.values():
        side.close()
    return rows


def report(result: dict) -> str:
    told = "; ".join(f"{key} {value}" for key, value in result["setting"].items() if value)
    head = ["Picture", "", "Side", "Time", "Times ours (least–most)"]
    labels = table.LABELS | {"host": "ComfyUI, Load VAE"}
    body = [
        [
            *(f"{row['pixels']}²", WAYS[row["way"]], labels[name], f"{seconds:.2f} s"),
            table.against(row, name),
        ]
        for row in result["rows"]
        for name, seconds in table.medians(row["turns"]).items()
    ]
    return "\n".join(["# SD3's VAE", "", told, "", *table.rows(head, body)])


def main() -> None:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=about)
    parser.add_argument("--pixels", type=words, default=["256", "512"])
    add_measuring(parser, repeats=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        maker = Side("fewstep", options.threads)
        path = maker(do="vae_file", folder=options.files or temporary)["path"]
        maker.close()
        result = {"setting": setting(options), "rows": measure(options, path)}
    keep(options, f"decode-{result['setting']['device']}", result, report(result))


if __name__ == "__main__":
    main()
