"""The README's tables, made from the code: `python tests/readme.py` writes them in.

A test (`tests/host/test_readme.py`) says when they have fallen behind.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def tables() -> dict[str, str]:
    """Marker name -> Markdown. ComfyUI must be importable (see `in_process`)."""
    from fewstep.flow import PRESETS
    from fewstep.nodes import NODES
    from fewstep.quant import types_markdown

    nodes = [node.define_schema() for node in NODES]
    rows = [f"| **{n.display_name}** | {n.description} |" for n in nodes]
    node_table = "\n".join(["| Node | What it does |", "|---|---|", *rows])
    presets = [
        f"| {p.label} | `{p.name}` | {sigmas(p)} | {p.rule} | {p.cfg:.3g} | {p.sure} | {p.source} |"
        for p in PRESETS
    ]
    head = ["| Model | Preset | Default sigmas | Rule | CFG | Sure | Source |", f"|{'---|' * 7}"]
    return {
        "nodes": node_table,
        "presets": "\n".join([*head, *presets]),
        "types": types_markdown().strip(),
    }


def sigmas(preset) -> str:
    if preset.formula == "flux2":
        return "from the picture's size"
    return " ".join(f"{s:.4f}".rstrip("0").rstrip(".") for s in preset.sigmas().tolist())


def filled(readme: str) -> str:
    """The README with its tables as the code has them."""
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme, n = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", readme, flags=re.S)
        assert n == 1, f"README.md has no place for the table '{name}'"
    return readme


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import run

    run.load_pack("fewstep")
    from fewstep.tests import in_process

    in_process.prepare()
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
