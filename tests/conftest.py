"""Three tiers by folder: pure (no ComfyUI), host (the real ComfyUI), browser (its real page).

The pack is imported as `fewstep`, as ComfyUI's loader would under a name of its own.
"""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).parent
TIERS = {
    "host": "host",
    "nodes": "host",
    "distill": "host",
    "peers": "host",
    "browser": "browser",
}  # any other folder is pure

spec = importlib.util.spec_from_file_location("run", TESTS.parent / "run.py")
loader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loader)
loader.load_pack("fewstep")

from fewstep import run  # noqa: E402 (there is no fewstep before this line)
from fewstep.tests import chromium  # noqa: E402

hypothesis.settings.register_profile("fewstep", deadline=None)  # machines are busy
hypothesis.settings.load_profile("fewstep")

NOT_RUN = pytest.StashKey[int]()  # how many tests of the browser tier were left out


def pytest_addoption(parser):
    parser.addoption("--peer-gguf", type=Path, help="a clone of city96/ComfyUI-GGUF, for peers/")


def pytest_collection_modifyitems(config, items):
    """Mark each test's tier. Without a browser, leave that tier out, but in CI let it fail."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        item.add_marker(TIERS.get(folder, "pure"))
    if chromium.find() is None and not os.environ.get("CI"):
        left_out = [item for item in items if item.get_closest_marker("browser")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
        config.stash[NOT_RUN] = len(left_out)
        if hasattr(config, "workeroutput"):  # one of pytest-xdist's processes
            config.workeroutput["not run"] = len(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[NOT_RUN] = getattr(node, "workeroutput", {}).get("not run", 0)


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(NOT_RUN, 0):
        terminalreporter.section("browser tier not run", red=True)
        terminalreporter.line(f"No Chromium or Chrome found. Install one: {chromium.REMEDY}")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A ComfyUI with the pack, on the CPU, as run.py starts it: see run.Host."""
    base = tmp_path_factory.mktemp("server")
    with run.Host(run.comfyui_folder(), base, sys.executable, ["--cpu"]) as host:
        yield host
