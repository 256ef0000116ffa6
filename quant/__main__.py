"""Make GGUF files of any model, and see what that cost: `python -m quant convert SRC DST …`."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping

from . import commands
from .effort import EFFORTS
from .errors import GGUFError

_CONVERT = """\
SRC  a .safetensors file (f32, f16, bf16, fp8 with scales), the first of its shards
     (…-00001-of-00003.safetensors) or their index (….safetensors.index.json), or a .gguf file
DST  the .gguf file; an old one of that name stays until the new one is whole

Of a checkpoint with several parts the diffusion model is taken, its prefix stripped; text encoders
and VAE are left out (--prefix takes another part). Tensors that are delicate, small or no matrices
keep 16 or 32 bits whatever the recipe.

  python -m quant convert sd3.5_medium.safetensors sd3.5_medium-Q6_K.gguf --type Q6_K
  python -m quant convert flux1-dev.safetensors flux1-dev-4.gguf --recipe flash-4 --plot cost.png
  python -m quant convert flux1-dev.safetensors turbo.gguf --type Q6_K --lora turbo.safetensors:1
  python -m quant convert all-in-one.safetensors vae.gguf --type F16 --prefix first_stage_model.
"""


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 an error told in one line on stderr, 2 wrong usage."""
    options = parser().parse_args(arguments)
    if sys.stdout is None:  # closed: `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    elif hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of any script on any terminal
    try:
        options.run(options)
        sys.stdout.flush()
    except GGUFError as error:
        print(f"python -m quant: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # of stdout: files that are read and written give GGUFError
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `… | head` has read enough
            print(f"python -m quant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was changed", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m quant", description=__doc__)
    add = top.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    _add_convert(add)
    command = add("inspect", help="what a file holds: architecture, metadata, types, size")
    command.add_argument("file")
    command.set_defaults(run=commands.run_inspect)
    _add_output(command)
    command = add("compare", help="what B costs against A, tensor by tensor")
    command.add_argument("first", metavar="A", help="the original, .safetensors or .gguf")
    command.add_argument("second", metavar="B", help="what was made of it")
    command.set_defaults(run=commands.run_compare)
    _add_output(command, plot=True)
    for name, run in (("recipes", commands.run_recipes), ("types", commands.run_types)):
        command = add(name, help=f"the {name} that there are")
        command.add_argument("--json", action="store_true", help="as JSON")
        command.set_defaults(run=run)
    return top


def _add_convert(add) -> None:
    command = add(
        "convert",
        help="quantise a model",
        epilog=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=commands.run_convert)
    option = command.add_argument
    option("source", metavar="SRC")
    option("destination", metavar="DST")
    how = command.add_mutually_exclusive_group(required=True)
    how.add_argument("--recipe", metavar="NAME", help="a mix of types: `python -m quant recipes`")
    how.add_argument("--type", type=commands.parse_type, metavar="TYPE",
                     help="one type for ordinary matrices: `python -m quant types`")  # fmt: skip
    how.add_argument("--budget", type=commands.parse_size, metavar="SIZE",
                     help="the best mix that fits: 1.8GB, or 4.5bpw (bits a weight)")  # fmt: skip
    option("--tensor", action="append", default=[], metavar="PATTERN=TYPE",
           type=commands.parse_override, help="for names like '*.qkv.weight=Q8_0'")  # fmt: skip
    option("--meta", action="append", default=[], type=commands.parse_meta, metavar="KEY=VALUE",
           help="a field to write, as fewstep.sigmas.4=1,0.9,0.75,0.5,0")  # fmt: skip
    option("--preset", type=_preset, metavar="NAME",
           help="a few-step schedule of flow/table.py, in place of the source's")  # fmt: skip
    option("--importance", metavar="F", help="an importance matrix, llama.cpp's imatrix.gguf")
    option("--lora", action="append", default=[], metavar="F[:STRENGTH]",
           type=commands.parse_strength,
           help="bake a LoRA in, .safetensors; may be given several times")  # fmt: skip
    option("--effort", choices=EFFORTS, default=EFFORTS[0],
           help="high: search longer, for less error in Q3_K to Q6_K than ggml's")  # fmt: skip
    option("--arch", metavar="TAG", help="general.architecture, where names do not tell it")
    option("--prefix", help="take only tensors whose names begin so, and strip it; '' for all")
    option("--allow-nonfinite", action="store_true",
           help="go on at NaN and infinity: 0 in a quantised tensor")  # fmt: skip
    option("--no-measure", action="store_true", help="do not measure errors; faster")
    _add_output(command, plot=True)


def _preset(name: str) -> Callable[[Mapping[str, object]], dict[str, object]]:
    """A file's fields -> those with this preset's `fewstep.*` in place of another's, by the room
    that knows them."""
    flow = importlib.import_module(__package__.removesuffix("quant") + "flow")
    try:
        fields = flow.preset_to_metadata(flow.find_preset(name))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return lambda metadata: flow.without_preset(metadata) | fields


def _add_output(command: argparse.ArgumentParser, plot: bool = False) -> None:
    command.add_argument("--json", action="store_true", help="the report as JSON")
    command.add_argument("--tensors", action="store_true", help="a line for each tensor")
    command.add_argument("--quiet", action="store_true", help="no progress line")
    if plot:
        command.add_argument("--plot", metavar="F.png", help="draw the errors (needs Pillow)")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `finally` runs
    sys.exit(main())
