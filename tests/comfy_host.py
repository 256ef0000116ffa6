"""ComfyUI for run.py and the tests: started as a program, or prepared inside this process.

    python tests/comfy_host.py COMFYUI_FOLDER [arguments of ComfyUI's main.py]

As a program it ends when its standard input does, so that no ComfyUI outlives what started it.

A CPU build of torch cannot load torchvision's compiled operators, and torchaudio may be missing.
Neither is used by image models, so both get a stand-in here, only where the real import fails.
"""

import importlib.machinery
import importlib.util
import os
import runpy
import sys
import threading
import types

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def add_stand_ins(cpu):
    """Make `import torchaudio` succeed and, with a CPU build of torch, `import torchvision`.

    On a GPU this process must not import torch before ComfyUI has chosen its memory allocator.
    """
    if importlib.util.find_spec("torchaudio") is None:
        add_empty_torchaudio()
    if cpu:
        try:
            import torchvision  # noqa: F401
        except RuntimeError:  # "operator torchvision::nms does not exist"
            define_torchvision_operators()


def define_torchvision_operators():
    """Define the two schemas that torchvision's Python half asks for; they have no kernel."""
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms" + NMS)
    library.define("qnms" + NMS)
    import torchvision

    torchvision.fewstep_operators = library  # the schemas live as long as this object


def add_empty_torchaudio():
    """Stand-in modules without content: ComfyUI then reports its audio models as unavailable."""
    for name in ("torchaudio", "torchaudio.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules["torchaudio"].functional = sys.modules["torchaudio.functional"]


def use_in_process(comfyui, base_directory):
    """Prepare this process for `import comfy` from the folder `comfyui`, on the CPU."""
    if str(comfyui) not in sys.path:
        sys.path.insert(0, str(comfyui))
        add_stand_ins(cpu=True)
        from comfy.cli_args import args

        args.cpu = True
        args.base_directory = str(base_directory)


def end_with_standard_input():
    """End this process as soon as the one that holds the other end of its stdin has ended."""

    def wait():
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main():
    comfyui, arguments = sys.argv[1], sys.argv[2:]
    end_with_standard_input()
    add_stand_ins(cpu="--cpu" in arguments)
    sys.path[0] = comfyui  # in place of tests/
    sys.argv = ["main.py", *arguments]
    runpy.run_path(f"{comfyui}/main.py", run_name="__main__")


if __name__ == "__main__":
    main()
