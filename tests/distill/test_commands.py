"""What is done with runs once they are trained: scored, merged, exported, timed and measured."""

import json
from argparse import Namespace

import pytest
import torch
from fewstep.distill import commands, runs
from fewstep.distill.loop import load_checkpoint
from fewstep.flow import preset_from_metadata
from fewstep.quant import GGUFFile
from fewstep.tests.distill.toy_runs import MATCH, STUDENT, Toy, options, run_all, write
from safetensors.torch import load_file


def test_a_run_is_drawn_with_by_its_name_alone(folder):
    run_all(folder)
    config = load_checkpoint(folder / "second.pt")["config"]
    assert config["start"] == "first" and config["renoise"] == "shared"
    given = {"steps": None, "cfg": None, "sheet": True, "captions": 3, "encoders": "no t5"}
    given["recipe"] = None
    for steps, drawn in ((None, 4), (2, 2)):
        given["steps"] = steps
        commands.eval(Namespace(folder=folder, name=["second"], **given), Toy())
        row = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
        assert (row["name"], row["cfg"], row["steps"]) == ("second", 1.0, drawn)
    assert (folder / "sheets" / "second-4-no-t5.png").exists()
    assert (row["renoise"], row["trained"]) == ("shared", 8) and "recipe" not in row
    given["recipe"] = "flash-2"
    commands.eval(Namespace(folder=folder, name=["second"], **given), Toy())
    twice = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert twice["recipe"] == "flash-2" and twice["overall"] == pytest.approx(
        2 * row["overall"], abs=1e-3
    )


def test_runs_are_timed_from_their_files(folder):
    run_all(folder)
    given = Namespace(folder=folder, name=["teacher", "second"], turns=3, pictures=2)
    given.recipe = "flash-8"
    commands.time(given, Toy())
    rows = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    keys = ("name", "steps", "seconds", "sampling", "pictures")
    seen = [[row[key] for key in keys] for row in rows]
    assert seen == [["teacher", 50, 2.0, 1.5, 2], ["second", 4, 3.0, 1.5, 2]]


def test_a_runs_files_say_how_it_is_sampled(folder, capsys):
    run_all(folder)
    given = {"name": "second", "models": folder / "models", "recipe": "flash-8", "file": None}
    commands.export(Namespace(folder=folder, **given), Toy())
    file = GGUFFile(str(folder / "models" / "second.gguf"))
    preset = preset_from_metadata(file.metadata)
    assert (preset.name, preset.steps, preset.cfg) == ("fewstep-second", 4, 1.0)
    expected = torch.tensor(runs.read_run(folder / "second.json").settings.sigmas)
    assert torch.equal(preset.sigmas(), expected)
    assert "second.gguf: 0.0 MB" in capsys.readouterr().out


def test_a_student_on_chords_says_that_it_draws_in_fewer_steps(folder):
    commands.train(options(folder, "teacher", "teacher"), Toy())
    for name, chords, trained in (
        ("straight", [1, 0], [2, 4]),
        ("bent", [1, 0.75, 0], [2, 4]),
        ("elsewhere", [1, 0.5, 0], [4]),
        ("curved", [], [4]),
    ):
        settings = STUDENT | {"batches": 1, "chords": chords, "states": "shared"}
        write(folder, name, "trajectory", settings, teacher="teacher")
        commands.train(options(folder, name, "trajectory"), Toy())
        write(folder, f"{name}-2", "match", MATCH, teacher="teacher", start=name)
        commands.train(options(folder, f"{name}-2", "match"), Toy())
        given = {"name": f"{name}-2", "models": folder / name, "recipe": "flash-8"}
        commands.export(Namespace(folder=folder, **given, file="fewstep-few"), Toy())
        preset = preset_from_metadata(GGUFFile(str(folder / name / "few.gguf")).metadata)
        assert [len(row) - 1 for row in preset.rows] == trained, name
        assert preset.label == "FewStep few" and preset.steps == 4


def test_a_style_is_exported_as_a_lora(folder, capsys):
    run_all(folder)
    write(folder, "dark", "style", STUDENT | {"style": "dark", "rank": 2}, teacher="second")
    commands.train(options(folder, "dark", "style"), Toy())
    given = {"name": "dark", "models": folder / "models", "recipe": "flash-8"}
    commands.export(Namespace(folder=folder, **given), Toy())
    path = folder / "models" / "loras" / "fewstep-dark.safetensors"
    tensors = load_file(path)
    name = "diffusion_model.joint_blocks.0.x_block.mlp.fc1.lora_down.weight"
    assert tensors[name].shape[0] == 2 and tensors[name].dtype == torch.float16
    assert "fewstep-dark.safetensors" in capsys.readouterr().out


def test_dry_run_tells_and_saves_nothing(folder, capsys):
    run_all(folder)
    before = sorted(path.name for path in folder.iterdir())
    given = options(folder, "second", "match")
    given.dry_run, given.set = True, ["renoise=random", "samples=400"]
    commands.train(given, Toy())
    out = capsys.readouterr().out
    assert (
        "renoise: random" in out and "100 steps of 4 samples" in out and "0.0 GB of memory" in out
    )
    assert sorted(path.name for path in folder.iterdir()) == before


def test_dry_run_of_stage_1_keeps_no_trajectory(folder, capsys):
    commands.train(options(folder, "teacher", "teacher"), Toy())
    before = sorted(path.name for path in folder.iterdir())
    given = options(folder, "first", "trajectory")
    given.dry_run = True
    commands.train(given, Toy())
    assert "2 steps of 4 samples" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_noise_of_runs_is_measured_as_each_was_trained(folder, capsys):
    run_all(folder)
    write(folder, "other", "match", MATCH | {"renoise": "random"}, teacher="teacher", start="first")
    commands.train(options(folder, "other", "match"), Toy())
    given = {"name": ["second", "other"], "batches": 2, "device": "cpu"}
    commands.noise(Namespace(folder=folder, **given), Toy())
    rows = [json.loads(line) for line in (folder / "noise.jsonl").read_text().splitlines()]
    assert [row["renoise"] for row in rows] == ["shared"] * 4 + ["random"] * 4
    with pytest.raises(ValueError, match="it is a merge"):
        given["name"] = ["third"]
        commands.merge(
            options(folder, "third", "merge", ratio=0.5, captions=3, encoders="both"), Toy()
        )
        commands.noise(Namespace(folder=folder, **given), Toy())


@pytest.mark.parametrize("ratio", [-0.1, 2.0, float("nan")])
def test_a_ratio_that_is_no_share_is_refused(folder, ratio):
    run_all(folder)
    scored = {"captions": 3, "encoders": "both"}
    with pytest.raises(ValueError, match=r"ratio is .*: expected a share from 0 to 1"):
        commands.merge(options(folder, "third", "merge", ratio=ratio, **scored), Toy())
    assert not (folder / "third.pt").exists()


def test_a_sheet_is_of_what_was_scored(folder):
    run_all(folder)
    given = {"steps": None, "sheet": True, "captions": 3}
    for encoders, recipe, cfg in (
        ("no t5", None, None),
        ("no t5", "flash-16", None),
        ("zero clip", None, 1.5),
    ):
        asked = given | {"encoders": encoders, "recipe": recipe, "cfg": cfg}
        commands.eval(Namespace(folder=folder, name=["second"], **asked), Toy())
    sheets = list((folder / "sheets").glob("second-4-*.png"))
    assert len(sheets) == 3 and len({path.read_bytes() for path in sheets}) == 3


def test_a_merge_takes_no_trained_runs_place(folder):
    run_all(folder)
    trained = (folder / "second.pt").read_bytes()
    given = options(folder, "second", "merge", ratio=0.5)
    with pytest.raises(ValueError, match=r"second\.pt was not merged but trained"):
        commands.merge(given, Toy())
    assert (folder / "second.pt").read_bytes() == trained


def test_a_score_that_cannot_be_noted_is_told(folder, capsys):
    run_all(folder)
    (folder / "evaluations.jsonl").mkdir()
    given = {"steps": None, "cfg": None, "sheet": False, "captions": 3, "encoders": "no t5"}
    with pytest.raises(OSError, match=r"evaluations\.jsonl cannot be written"):
        commands.eval(Namespace(folder=folder, name=["second"], recipe=None, **given), Toy())
    assert "name second  steps 4" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["teacher", "first"])
def test_noise_is_of_stage_two_alone(folder, name):
    run_all(folder)
    given = Namespace(folder=folder, name=[name], device="cpu", batches=2)
    with pytest.raises(ValueError, match=f"{name} is a run of .*: noise is measured of those of"):
        commands.noise(given, Toy())


def test_what_ships_is_noted_file_by_file(folder):
    for names in (["fewstep-teacher"], ["fewstep-teacher", "fewstep-demo"]):
        commands.shipped(Namespace(folder=folder, name=names, captions=12), Toy())
    lines = [json.loads(line) for line in (folder / "shipped.jsonl").read_text().splitlines()]
    student, teacher = ("fewstep-demo", 4), ("fewstep-teacher", 50)
    seen = [(line["name"], line["steps"]) for line in lines]
    assert seen == [teacher, student, ("fewstep-demo", 2), teacher]
    assert lines[0]["overall"] == 0.3333 and lines[0]["captions"] == 12


def test_a_file_that_does_not_ship_is_told(folder):
    with pytest.raises(ValueError, match="no fewstep-demos ships: there are fewstep-demo and few"):
        commands.shipped(Namespace(folder=folder, name=["fewstep-demos"], captions=12), Toy())
    assert not (folder / "shipped.jsonl").exists()
