"""The host tier's ComfyUI in this process, with a base directory of its own."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from fewstep import run
from fewstep.tests import comfy_host


@cache
def prepare():
    """Put ComfyUI on sys.path, on the CPU, once; return its base directory."""
    base = Path(tempfile.mkdtemp(prefix="fewstep-host-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for folder in ("models", "input", "output", "temp", "custom_nodes"):
        (base / folder).mkdir()
    comfy_host.use_in_process(run.comfyui_folder(), base)
    return base
