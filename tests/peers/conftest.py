"""What others make of our files. Left out, with the reason, where they are not at hand:

    python run.py test -- tests/peers --peer-gguf CLONE_OF_COMFYUI_GGUF

and, with the package stable-diffusion-cpp-python installed (or on PYTHONPATH), stable-diffusion.cpp
in a process of its own, since it ends the process that it does not get on with.
"""

import importlib
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from fewstep.quant import GGUFFile, dequantize
from fewstep.quant.codebook import NEED_IMPORTANCE
from fewstep.quant.convert import Options, convert
from fewstep.quant.plan import make_plan
from fewstep.quant.recipes import recipe_of_type
from fewstep.quant.sources import open_source
from fewstep.tests import in_process
from gguf import GGMLQuantizationType as T

in_process.prepare()

CPP = """
import json, sys
from stable_diffusion_cpp import StableDiffusion, _logger, stable_diffusion_cpp as library
do, *given = json.loads(sys.argv[1])
_logger.set_verbose(True)
if do == "convert":
    sys.exit(not library.convert(given[0].encode(), b"", given[1].encode(), 0, b"", False))
model = StableDiffusion(n_threads=2, verbose=True, **given[0])
if given[1]:
    model.generate_image(prompt="a", sample_steps=1, cfg_scale=1.0, width=128, height=128)
"""


@pytest.fixture(scope="session")
def city96(request):
    """city96(module) of the clone, which ComfyUI would have imported as a package."""
    clone = request.config.getoption("--peer-gguf")
    if clone is None:
        pytest.skip("no clone of city96/ComfyUI-GGUF: --peer-gguf CLONE")
    clone = clone.resolve()
    sys.path.insert(0, str(clone.parent))
    return lambda module: importlib.import_module(f"{clone.name}.{module}")


@pytest.fixture(scope="session")
def cpp():
    """cpp(action, …) -> stable-diffusion.cpp's log; its process may end badly."""
    if importlib.util.find_spec("stable_diffusion_cpp") is None:
        pytest.skip("the package stable-diffusion-cpp-python is not installed")

    def run(*request):
        command = [sys.executable, "-c", CPP, json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def make():
    """make(safetensors, type, metadata, **plan) -> path of the GGUF file beside it."""

    def convert_to(source, qtype: T, metadata=None, **options):
        target = source.with_name(f"{source.stem}-{qtype.name}.gguf")
        plan = make_plan(open_source(source), recipe_of_type(qtype), **options)
        needed = plan.choices if qtype in NEED_IMPORTANCE else ()
        even = {choice.name: torch.ones(choice.source.cols) for choice in needed}
        convert(plan, target, metadata, Options(measure=False, importance=even))
        return target

    return convert_to


@pytest.fixture(scope="session")
def unpacked():
    """unpacked(path) -> the file's tensors by name, float32, as we read them."""

    def read(path):
        file = GGUFFile(path)
        return {
            name: dequantize(file.blocks(name), info.qtype, info.shape)
            for name, info in file.tensors.items()
        }

    return read
