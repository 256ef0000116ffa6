"""Three tiers by folder: pure (no ComfyUI), host (the real ComfyUI), browser (its real page).

The pack is imported as `fewstep`, as ComfyUI's loader would under a name of its own.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TIERS = {"host": "host", "nodes": "host", "browser": "browser"}  # any other folder is pure

spec = importlib.util.spec_from_file_location("run", TESTS.parent / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
run.load_pack("fewstep")


def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        item.add_marker(TIERS.get(folder, "pure"))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A ComfyUI with the pack, on the CPU, as run.py starts it: see run.Host."""
    base = tmp_path_factory.mktemp("server")
    with run.Host(run.comfyui_folder(), base, sys.executable, ["--cpu"]) as host:
        yield host
