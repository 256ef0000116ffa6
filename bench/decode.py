"""How fast FewStep Load VAE's VAE draws and reads a picture, beside ComfyUI's own Load VAE.

    python -m bench.decode [--vae SD3,TAESD] [--pixels 256,512] [--files FOLDER]

Files of SD3's VAE and of its TAESD with random weights in float16; sides take turns, each in a
process of its own, as in `python -m bench`. The results go to bench/results/decode-<device>.json
and .md.
"""

import argparse
import itertools
import tempfile

from . import table
from .__main__ import Side, add_measuring, counts, keep, say, setting, some

VAES = ("SD3", "TAESD")
WAYS = {"decode": "latent to picture", "encode_picture": "picture to latent"}


def measure(options: argparse.Namespace, paths: dict[str, str]) -> list[dict]:
    """A row for each VAE of `paths`, size and way."""
    sides = {name: Side(name, options.threads) for name in ("fewstep", "host")}
    rows = []
    for vae, path in paths.items():
        for side in sides.values():
            side(do="load_vae", file=path)
        for pixels, way in itertools.product(options.pixels, WAYS):
            turns = [
                {name: side(do=way, pixels=pixels)[options.clock] for name, side in sides.items()}
                for _ in range(options.repeats + 1)
            ]
            rows.append({"vae": vae, "pixels": pixels, "way": way, "turns": turns[1:]})
            say(f"{vae}, {pixels}², {WAYS[way]}: {table.medians(turns[1:])}")
    for side in sides.values():
        side.close()
    return rows


def report(result: dict) -> str:
    told = "; ".join(f"{key} {value}" for key, value in result["setting"].items() if value)
    head = ["VAE", "Picture", "", "Side", "Time", "Times ours (least–most)"]
    labels = table.LABELS | {"host": "ComfyUI, Load VAE"}
    body = [
        [
            *(row["vae"], f"{row['pixels']}²", WAYS[row["way"]], labels[name]),
            f"{seconds:.3f} s",
            table.against(row, name),
        ]
        for row in result["rows"]
        for name, seconds in table.exact_medians(row["turns"]).items()
    ]
    return "\n".join(["# VAEs", "", told, "", *table.rows(head, body)])


def main() -> None:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=about)
    parser.add_argument("--vae", type=some(*VAES), default=VAES, help=", ".join(VAES))
    parser.add_argument("--pixels", type=counts, default=[256, 512])
    add_measuring(parser, repeats=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        maker = Side("fewstep", options.threads)
        folder = options.files or temporary
        paths = {
            kind: maker(do="vae_file", folder=folder, kind=kind)["path"] for kind in options.vae
        }
        maker.close()
        result = {"setting": setting(options), "rows": measure(options, paths)}
    keep(options, f"decode-{result['setting']['device']}", result, report(result))


if __name__ == "__main__":
    main()
