"""The rooms stay apart: `quant` and `flow` work on a machine that has no ComfyUI."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
