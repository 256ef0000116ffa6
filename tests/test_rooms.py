"""The rooms stay apart: who may import whom, and `quant` and `flow` work without ComfyUI."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# room -> the other rooms, and the parts of ComfyUI, that it may import (DESIGN.md)
ROOMS = {
    "quant": set(),
    "flow": set(),
    "host": {"quant", "flow", "comfy", "comfy_kitchen", "folder_paths", "latent_preview"},
    "nodes": {"distill", "host", "quant", "flow", "comfy_api", "folder_paths"},
    "distill": {"flow", "quant", "host"},
    "demo": {"distill", "flow", "quant", "host"},
}
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "comfy_kitchen", "folder_paths", "latent_preview"}
IMPORT_A_ROOM = """
import importlib, json, pkgutil, sys
import run
run.load_pack()
room = importlib.import_module("fewstep." + sys.argv[1])
for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("room", ["quant", "flow"])
def test_room_imports_no_comfyui(room):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_A_ROOM, room], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    packages = set(json.loads(done.stdout))
    assert "fewstep" in packages and "torch" in packages
    assert packages.isdisjoint(
        {"comfy", "comfy_api", "comfy_kitchen", "comfy_extras", "folder_paths", "nodes"}
    )


def imports(path, room):
    """Names of the rooms and of the packages that a file of `room` imports."""
    depth = len(path.relative_to(ROOT / room).parts)  # this many dots lead to the pack
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            yield node.module.split(".")[0] if node.module else "the pack itself"


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_it_may(room):
    bounded = COMFYUI | set(ROOMS) | {"fewstep", "the pack itself"}
    forbidden = bounded - ROOMS[room] - {room}
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__main__.py"  # a program prepares ComfyUI before it enters its room
        for name in imports(path, room)
        if name in forbidden
    }
    assert found == set()
