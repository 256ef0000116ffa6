"""`python -m quant` as a person runs it: output, exit codes, one line for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fewstep.flow import find_preset, preset_from_metadata, preset_to_metadata
from fewstep.quant import GGUFError, GGUFFile, write_gguf
from fewstep.quant.__main__ import main
from fewstep.quant.commands import parse_meta
from fewstep.tests.quant import models
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


def from_shell(*arguments):
    command = [sys.executable, "-W", "error", "-m", "quant", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def run(capsys):
    """run(argument, …) -> what `from_shell` gives, without a process of its own."""

    def call(*arguments):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "sd3.safetensors"
    save_file(models.sd3(), path)
    return path


def test_convert_inspect_compare(run, tmp_path, source):
    target = tmp_path / "a.gguf"
    fields = ["--meta", "fewstep.sigmas.2=1,0.5,0", "--meta", "general.name=my model"]
    done = run("convert", source, target, "--type", "q8_0", "--json", *fields)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["architecture"] == "sd3" and 8.5 < report["bits_per_weight"] < 10
    assert report["size"] == target.stat().st_size
    metadata = GGUFFile(target).metadata
    assert metadata["fewstep.sigmas.2"] == [1, 0.5, 0] and metadata["general.name"] == "my model"

    done = run("inspect", target)
    assert done.returncode == 0
    assert "sd3" in done.stdout and "Q8_0" in done.stdout and "my model" in done.stdout
    told = json.loads(run("inspect", target, "--json").stdout)
    assert told["metadata"]["general.name"] == "my model"
    assert {entry["type"] for entry in told["types"]} == {"Q8_0", "BF16", "F32"}

    done = run("compare", source, target, "--json")
    compared = json.loads(done.stdout)
    assert done.returncode == 0
    assert compared["relative_error"] == pytest.approx(report["relative_error"])
    assert compared["worst"] == report["worst"]


def test_works_from_the_shell(tmp_path, source):
    done = from_shell(
        "convert", source, tmp_path / "a.gguf", "--type", "Q4_0", "--preset", "swd-sd3.5"
    )
    assert (done.returncode, done.stderr) == (0, "") and "bits a weight" in done.stdout
    assert GGUFFile(tmp_path / "a.gguf").metadata["fewstep.rule"] == "renoise"
    done = from_shell("inspect", tmp_path / "absent.gguf")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1


def test_another_python_is_told_which_one_to_take():
    """-S leaves site-packages out, as a Python has it that nothing was installed for."""
    command = [sys.executable, "-S", "-m", "quant", "recipes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "lacks torch, numpy, gguf:" in done.stderr
    assert "`python run.py demo`" in done.stderr and ".venv" in done.stderr


def test_preset_plot_and_lines_for_all_tensors(run, tmp_path, source):
    target, plot = tmp_path / "a.gguf", tmp_path / "a.png"
    options = ["--preset", "sd3.5-large-turbo", "--plot", plot, "--tensors"]
    done = run("convert", source, target, "--recipe", "Q4_0", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in models.sd3())
    preset = preset_from_metadata(GGUFFile(target).metadata)
    assert preset.name == "sd3.5-large-turbo"
    with Image.open(plot) as picture:
        assert picture.size == (1200, 640) and len(picture.getcolors(10**6)) > 3
    done = run("compare", target, target, "--plot", tmp_path / "same.png")  # nothing to draw
    assert done.returncode == 0 and (tmp_path / "same.png").exists()


def test_a_preset_takes_the_place_of_the_sources(run, tmp_path, source):
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    options = ["--type", "Q4_0", "--preset"]
    run("convert", source, first, *options, "swd-sd3.5", "--meta", "fewstep.mine=1")
    run("convert", first, second, *options, "flux.1-schnell")
    fields, expected = GGUFFile(second).metadata, find_preset("flux.1-schnell")
    assert preset_to_metadata(preset_from_metadata(fields)) == preset_to_metadata(expected)
    assert fields["fewstep.mine"] == 1 and "fewstep.latent_sides.4" not in fields


def test_mistakes_are_one_line_without_traceback(run, tmp_path, source):
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x02")
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:-100])
    out = tmp_path / "out.gguf"
    absent = run("compare", source, source, "--plot", tmp_path / "absent" / "a.png")
    assert absent.returncode == 1 and "not a file in a folder" in absent.stderr
    before = source.read_bytes()
    model = run("compare", source, source, "--plot", source)
    assert model.returncode == 1 and "named as a model" in model.stderr
    assert source.read_bytes() == before
    cases = {
        "No such file": (tmp_path / "absent.safetensors", out),
        "a pickle": (tmp_path / "a.ckpt", out),
        "bytes are missing": (tmp_path / "cut.safetensors", out),
        "is the source itself": (source, source),
        "no folder": (source, tmp_path / "absent" / "a.gguf"),
    }
    for message, (first, second) in cases.items():
        done = run("convert", first, second, "--type", "Q8_0")
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr and done.stderr.count("\n") == 1
    assert not out.exists()


def test_a_plot_that_fails_leaves_the_report(run, tmp_path, source, monkeypatch):
    def full(report, path):
        raise GGUFError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr("fewstep.quant.commands.draw", full)
    given = ("convert", source, tmp_path / "a.gguf", "--type", "Q8_0")
    done = run(*given, "--plot", tmp_path / "a.png")
    assert done.returncode == 1 and "No space left" in done.stderr
    assert "bits a weight" in done.stdout and (tmp_path / "a.gguf").exists()


def test_the_importance_file_is_not_replaced(run, tmp_path, source):
    matrix, name = tmp_path / "i.gguf", "joint_blocks.0.x_block.attn.qkv.weight"
    sums = [(name + ".in_sum2", torch.rand(1, 256)), (name + ".counts", torch.ones(1, 1))]
    write_gguf(matrix, "imatrix", {}, sums)
    done = run("convert", source, matrix, "--type", "Q8_0", "--importance", matrix)
    assert done.returncode == 1 and "is the source itself" in done.stderr


def test_wrong_usage_shows_what_there_is(run):
    for arguments, message in (
        (["convert", "a", "b", "--type", "Q9"], "known: F32"),
        (["convert", "a", "b"], "--recipe"),
        (["convert", "a", "b", "--type", "Q8_0", "--preset", "x"], "sd3.5-large-turbo"),
        (["convert", "a", "b", "--type", "Q8_0", "--tensor", "x"], "PATTERN=TYPE"),
        (["convert", "a", "b", "--type", "Q8_0", "--meta", "x"], "KEY=VALUE"),
        ([], "COMMAND"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ("null", "null"),
        ('{"a": 1}', '{"a": 1}'),
        ("[]", "[]"),
        ("[[1], [2]]", "[[1], [2]]"),
        ("[" * 10**5, "[" * 10**5),
        ("1,2.5", [1.0, 2.5]),
        ("-3", -3),
    ],
)
def test_a_field_that_is_no_list_of_numbers_is_text(text, value):
    assert parse_meta(f"key={text}") == ("key", value)


@pytest.mark.parametrize("key", ["split.count", "comfy.gguf.orig_shape.a", "general.alignment"])
def test_fields_that_describe_the_file_are_not_given(run, key):
    """With them nobody could read it."""
    done = run("convert", "a", "b.gguf", "--type", "Q8_0", "--meta", f"{key}=3")
    assert done.returncode == 2 and "describes the file itself" in done.stderr


def test_inspect_goes_by_the_bytes_not_the_name(run, tmp_path, source):
    write_gguf(tmp_path / "a.safetensors", "x", {"general.name": "hers"}, [("a", torch.ones(3))])
    assert "general.name" in run("inspect", tmp_path / "a.safetensors").stdout
    (tmp_path / "b.gguf").write_bytes(source.read_bytes())
    done = run("inspect", tmp_path / "b.gguf")
    assert (done.returncode, done.stderr) == (0, "") and "sd3" in done.stdout


def test_names_do_not_reach_the_terminal_raw(run, tmp_path):
    write_gguf(tmp_path / "a.gguf", "x", {"a": "\x1b[2J"}, [("b\x1b[31m\nc", torch.ones(3))])
    said = run("inspect", tmp_path / "a.gguf", "--tensors").stdout
    assert r"b\x1b[31m\nc" in said and r"\x1b[2J" in said and "\x1b" not in said


def test_json_stays_json(run, tmp_path):
    fields = {"a": float("nan"), "b": [1.0, float("inf")], "c": "×"}
    write_gguf(tmp_path / "a.gguf", "x", fields, [("имя", torch.ones(3))])
    text = run("inspect", tmp_path / "a.gguf", "--json").stdout
    told = json.loads(text, parse_constant=pytest.fail)
    assert text.isascii() and told["tensors"][0]["name"] == "имя"
    assert told["metadata"] | {"a": "nan", "b": [1.0, "inf"], "c": "×"} == told["metadata"]


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_stdout_may_be_closed_full_or_of_few_letters(tmp_path):
    write_gguf(tmp_path / "a.gguf", "x", {}, [("имя", torch.ones(3))])

    def shell(redirection, **variables):
        command = f"{sys.executable} -m quant inspect {tmp_path / 'a.gguf'} --tensors {redirection}"
        environment = os.environ | variables
        return subprocess.run(
            command, shell=True, cwd=ROOT, capture_output=True, text=True, env=environment
        )

    done = shell(">&-")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell("", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and r"\u0438" in done.stdout
    if os.path.exists("/dev/full"):
        done = shell("> /dev/full")
        assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_lists(run, source):
    assert "flash-6" in run("recipes").stdout
    assert json.loads(run("recipes", "--json").stdout)["Q4_K_M"]["base"] == "Q4_K"
    rows = {row["type"]: row for row in json.loads(run("types", "--json").stdout)}
    assert rows["Q8_0"]["writable"] and rows["Q8_0"]["bits_per_weight"] == 8.5
    done = run("convert", source, "b.gguf", "--recipe", "nope")
    assert done.returncode in (1, 2) and "flash-16, flash-8" in done.stderr


def test_budget_and_importance(run, tmp_path, source):
    target, matrix = tmp_path / "a.gguf", tmp_path / "i.gguf"
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    sums = [(name + ".in_sum2", torch.rand(1, 256)), (name + ".counts", torch.ones(1, 1))]
    write_gguf(matrix, "imatrix", {}, sums)
    given = ("convert", source, target, "--importance", matrix)
    done = run(*given, "--budget", "3MB")
    assert (done.returncode, done.stderr) == (0, "") and "by budget" in done.stdout
    assert target.stat().st_size < 3.1e6
    done = run(*given, "--budget", "3kB")
    assert done.returncode == 1 and "too small: the smallest types take" in done.stderr
    assert run(*given, "--budget", "much").returncode == 2
    assert run("convert", source, target, "--type", "Q4_K", "--importance", matrix).returncode == 0
    done = run("convert", source, target, "--type", "IQ2_XS", "--effort", "high")
    assert done.returncode == 1 and "IQ2_XS, which needs an importance" in done.stderr
    done = run("convert", source, target, "--type", "Q4_K", "--importance", source)
    assert done.returncode == 1 and "not a GGUF file but safetensors" in done.stderr


def test_a_budget_tells_of_nonfinite_weights_as_types_do(run, tmp_path):
    tensors = {"blk.weight": torch.randn(64, 256), "huge.weight": torch.full((64, 256), 1e9)}
    tensors["blk.weight"][3, 5] = float("inf")
    save_file(tensors, tmp_path / "a.safetensors")
    given = ("convert", tmp_path / "a.safetensors", tmp_path / "a.gguf", "--budget")
    done = run(*given, "7bpw")
    assert done.returncode == 1 and "a.safetensors: tensor 'blk.weight' holds 1 NaN" in done.stderr
    done = run(*given, "13bpw", "--allow-nonfinite", "--tensor", "huge.*=BF16")
    assert done.returncode == 0 and "row 3 on: stored as 0" in done.stdout
    done = run(*given, "9" * 400 + "GB", "--allow-nonfinite")
    assert done.returncode == 1 and "add --tensor huge.weight=BF16" in done.stderr


def test_half_a_report_is_enough(source):
    """`… | head -1` closes the pipe early."""
    command = f"{sys.executable} -m quant inspect {source} --tensors | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
