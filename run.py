"""`python run.py demo` draws a picture, `python run.py test` runs every test."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
HOST = ROOT / ".host"


def load_pack(alias="fewstep"):
    """Import this checkout as the package `alias`, as ComfyUI's loader does, and return it.

    Takes the checkout off sys.path, where `python -m` and pytest put it: its nodes/ would hide
    ComfyUI's nodes.py.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            alias, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        spec.loader.exec_module(module)
    return sys.modules[alias]


def comfy_path():
    """Folder of the ComfyUI in use: the user's own ($COMFYUI_PATH) first, else the fetched one."""
    own = os.environ.get("COMFYUI_PATH")
    return Path(own).expanduser().resolve() if own else HOST / "ComfyUI"
