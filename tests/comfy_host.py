"""ComfyUI for run.py and the tests: started as a program, or prepared inside this process.

    python tests/comfy_host.py COMFYUI_FOLDER [arguments of ComfyUI's main.py]

A CPU build of torch cannot load torchvision's compiled operators, and torchaudio may be missing.
Neither is used by image models, so both get a stand-in here, only where the real import fails.
"""

import importlib.machinery
import runpy
import sys
import types

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def add_stand_ins():
    """Make `import torchvision` and `import torchaudio` succeed; the real ones stay if they do."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # "operator torchvision::nms does not exist"
        define_torchvision_operators()
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):  # missing, or its library does not fit this torch
        add_empty_torchaudio()


def define_torchvision_operators():
    """Define the two schemas that torchvision's Python half asks for; they have no kernel."""
    import torch

    forget("torchvision")
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms" + NMS)
    library.define("qnms" + NMS)
    import torchvision

    torchvision.fewstep_operators = library  # the schemas live as long as this object


def add_empty_torchaudio():
    """Stand-in modules without content: ComfyUI then reports its audio models as unavailable."""
    forget("torchaudio")
    for name in ("torchaudio", "torchaudio.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules["torchaudio"].functional = sys.modules["torchaudio.functional"]


def forget(package):
    """Drop what a failed import of `package` left behind."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def use_in_process(comfyui, base_directory):
    """Prepare this process for `import comfy` from the folder `comfyui`, on the CPU."""
    if str(comfyui) not in sys.path:
        sys.path.insert(0, str(comfyui))
        add_stand_ins()
        from comfy.cli_args import args

        args.cpu = True
        args.base_directory = str(base_directory)


def main():
    comfyui, arguments = sys.argv[1], sys.argv[2:]
    add_stand_ins()
    sys.path[0] = comfyui  # in place of tests/
    sys.argv = ["main.py", *arguments]
    runpy.run_path(f"{comfyui}/main.py", run_name="__main__")


if __name__ == "__main__":
    main()
