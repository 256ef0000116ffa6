"""Runs from a JSON file: every stage end to end on a toy, and what a wrong file is told."""

import json
import re
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from fewstep.distill import commands, kept, runs
from fewstep.distill.loop import load_checkpoint
from fewstep.distill.model import FlowModel
from fewstep.flow import find_preset, preset_from_metadata, preset_to_metadata, uniform
from fewstep.quant import GGUFFile, write_gguf
from fewstep.tests.distill import toys
from safetensors.torch import load_file

SIZES = {"depth": 1, "text_width": 32, "text_heads": 2, "t5_pieces": 8, "batch": 4, "warmup": 2}
STUDENT = {"batch": 4, "warmup": 2}
MATCH = STUDENT | {"proxy_warmup": 0}


class Toy:
    """A data set whose every picture is a gray square, and whose score is a weight's size."""

    vocabulary, widths = tuple(toys.WORDS), (1,) * 8

    def batch(self, size, encoders, index):
        latents, tokens = toys.data(index, size)
        return latents, tokens[:, :encoders]

    def mended(self, latents, index):
        return latents + index

    def styled(self, style, size, encoders, index):
        return self.batch(size, encoders, index)[1], lambda latents: latents - 1

    def sheet(self, model, sigmas, cfg, encoders="no t5"):
        said = sum(map(len, (encoders, str(cfg)))) + model.mmdit.final_layer.linear.weight.norm()
        return np.full((8, 8, 3), int(said), np.uint8)

    def evaluate(self, model, sigmas, cfg, captions, encoders, choosing=False):
        score = model.mmdit.final_layer.linear.weight.norm().item()
        chosen = {"choosing": float(choosing), "steps drawn": len(sigmas) - 1}
        return {"overall": score, "right": score / 2, **chosen}

    def quantised(self, model, recipe):
        model.mmdit.final_layer.linear.weight.mul_(int(recipe.removeprefix("flash-")))
        return model

    def prove(self, name, steps, captions):
        return ({"name": name, "steps": n, "overall": 1 / 3, "captions": captions} for n in steps)

    def through_host(self, folders, turns):
        assert all((folder / "drawn.gguf").exists() for folder in folders)
        return [[(2.0 + n, 1.5), (9.0, 2.5), (1.0, 0.5)] for n in range(len(folders))]

    def shipped(self, name, config):
        torch.manual_seed(len(name))
        preset = find_preset("sd3.5-flash-experimental")
        preset = preset if name == "student" else replace(preset, cfg=2.0)
        return FlowModel(config, self.vocabulary), preset

    def export(self, model, preset, folder, recipe, file):
        folder.mkdir()
        (folder / "drawn.gguf").touch()
        path = folder / f"{preset.name.removeprefix('fewstep-')}.gguf"
        weight = model.mmdit.final_layer.linear.weight.detach()
        write_gguf(path, "sd3", preset_to_metadata(preset), [("final.weight", weight)])
        return [path]


def write(folder, name, stage, settings, **others):
    described = {"stage": stage, "samples": 8, "settings": settings, **others}
    (folder / f"{name}.json").write_text(json.dumps(described))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "teacher", "teacher", SIZES)
    write(tmp_path, "first", "trajectory", STUDENT | {"batches": 2}, teacher="teacher")
    write(tmp_path, "second", "match", MATCH, teacher="teacher", start="first")
    write(tmp_path, "third", "match", MATCH | {"ema": 0.5}, teacher="teacher", start="second")
    return tmp_path


def options(folder, name, command, **others):
    given = {"command": command, "config": folder / f"{name}.json", "name": None, "set": []}
    rest = {"dry_run": False, "folder": folder, "device": "cpu", "sheet_minutes": 0.0}
    return Namespace(**given, **rest, **others)


def test_aligns_before_the_teacher(folder):
    write(folder, "align", "align", SIZES)
    commands.train(options(folder, "align", "align"), Toy())
    given = options(folder, "teacher", "teacher")
    given.set = ["start=align"]
    commands.train(given, Toy())
    assert load_checkpoint(folder / "teacher.pt")["config"]["start"] == "align"


def test_a_teachers_t5_is_made_anew_and_learns_to_be_enough(folder):
    write(folder, "teacher", "teacher", SIZES)
    write(folder, "align", "align", SIZES, start="teacher")
    write(folder, "either", "either", SIZES, start="align")
    for name in ("teacher", "align", "either"):
        commands.train(options(folder, name, name), Toy())
    before, after = (kept.load_model(folder, name, Toy()) for name in ("align", "either"))
    for name, value in after.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]) or name.startswith("t5."), name
    assert not torch.equal(before.t5.shared.weight, after.t5.shared.weight)
    sigmas, cfg = kept.schedule(kept.checkpoint(folder, "either")["config"])
    assert (len(sigmas), cfg) == (51, 2.0)


def test_a_model_that_ships_is_started_from(folder):
    given = options(folder, "teacher", "adopt", shipped="toy")
    given.name = "ready"
    commands.adopt(given, Toy())
    adopted = kept.load_model(folder, "ready", Toy())
    shipped, _ = Toy().shipped("toy", adopted.config)
    assert torch.equal(adopted.t5.shared.weight, shipped.t5.shared.weight)
    given = options(folder, "first", "trajectory")
    given.set = ["teacher=ready"]
    commands.train(given, Toy())
    assert load_checkpoint(folder / "first.pt")["config"]["teacher"] == "ready"


def test_a_student_that_ships_is_drawn_and_gone_on_from_as_one(folder, capsys):
    given = options(folder, "teacher", "adopt", shipped="student")
    given.name = "ready"
    with pytest.raises(FileNotFoundError, match="train the run teacher first"):
        commands.adopt(given, Toy())
    commands.train(options(folder, "teacher", "teacher"), Toy())
    commands.adopt(given, Toy())
    drawn, teacher = (kept.load_model(folder, name, Toy()) for name in ("ready", "teacher"))
    shipped, preset = Toy().shipped("student", teacher.config)
    assert torch.equal(drawn.mmdit.pos_embed, shipped.mmdit.pos_embed)
    assert torch.equal(drawn.t5.shared.weight, teacher.t5.shared.weight)
    sigmas, cfg = kept.schedule(kept.checkpoint(folder, "ready")["config"])
    assert torch.equal(sigmas, preset.sigmas()) and cfg == 1
    write(folder, "dark", "style", STUDENT | {"style": "dark", "rank": 2}, teacher="ready")
    commands.train(options(folder, "dark", "style"), Toy())
    given = options(folder, "second", "match")
    given.set = ["start=ready"]
    commands.train(given, Toy())
    exported = {"models": folder / "models", "recipe": "flash-8", "file": None}
    commands.export(Namespace(folder=folder, name="ready", **exported), Toy())
    assert "ready.gguf" in capsys.readouterr().out


def run_all(folder):
    commands.train(options(folder, "teacher", "teacher"), Toy())
    commands.train(options(folder, "first", "trajectory"), Toy())
    commands.train(options(folder, "second", "match"), Toy())
    commands.split(options(folder, "third", "split"), Toy())


def test_every_stage_runs_and_goes_on(folder, capsys):
    for _ in range(2):
        run_all(folder)
    scored = {"captions": 3, "encoders": "both"}
    commands.merge(options(folder, "third", "merge", ratio=None, **scored), Toy())
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [row["ratio"] for row in rows] == list(commands.RATIOS)
    assert all(row["choosing"] for row in rows)  # other captions than those that are reported
    best = float(re.search(r"ratio ([\d.]+) of the high branch", capsys.readouterr().out)[1])
    (chosen,) = (row["overall"] for row in rows if row["ratio"] == best)
    assert chosen == max(row["overall"] for row in rows)
    low, high = (kept.weights_of(folder, f"third-{part}") for part in ("low", "high"))
    merged = kept.load_model(folder, "third", Toy()).mmdit.state_dict()
    for name, value in merged.items():
        assert torch.allclose(value, torch.lerp(low[name], high[name], best)), name
    assert any(not torch.equal(low[name], high[name]) for name in low)
    config = load_checkpoint(folder / "third.pt")["config"]
    assert (config["stage"], config["ema"], config["start"]) == ("merge", 0.5, "second")


def test_a_run_leaves_losses_and_sheets(folder, monkeypatch):
    monkeypatch.setattr("fewstep.distill.loop.LOG_STEPS", 1)
    run_all(folder)
    rows = [json.loads(line) for line in (folder / "second.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"loss", "gradient", "matching", "proxy", "judge"} <= set(rows[0])
    assert len(list((folder / "sheets" / "second").glob("*.png"))) == 2


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
    given = Namespace(folder=folder, name=["teacher", "second"], turns=3, recipe="flash-8")
    commands.time(given, Toy())
    rows = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    seen = [[row[key] for key in ("name", "steps", "seconds", "sampling")] for row in rows]
    assert seen == [["teacher", 50, 2.0, 1.5], ["second", 4, 3.0, 1.5]]


def test_a_teacher_is_drawn_in_fifty_steps_with_guidance():
    sigmas, cfg = kept.schedule({"stage": "teacher"})
    assert len(sigmas) == 51 and cfg == 2.0
    assert torch.equal(kept.schedule({"stage": "teacher"}, 4)[0], uniform(4, 3.0))


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


def test_only_the_t5_learns_if_asked(folder):
    commands.train(options(folder, "teacher", "teacher"), Toy())
    write(folder, "t5", "teacher", SIZES | {"learn": "t5."}, start="teacher")
    commands.train(options(folder, "t5", "teacher"), Toy())
    before, after = (
        load_checkpoint(folder / f"{name}.pt")["task"]["ema"] for name in ("teacher", "t5")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("t5.") for name in changed)


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


def test_text_may_begin_like_json(folder):
    settings = ["start=third", "teacher=../teacher", "samples=12", "renoise=false alarm"]
    with pytest.raises(ValueError, match="renoise is 'false alarm'"):
        runs.read_run(folder / "third.json", None, settings)
    made = runs.read_run(folder / "third.json", None, settings[:-1])
    assert (made.start, made.teacher, made.samples) == ("third", "../teacher", 12)


def test_trajectories_of_another_teacher_are_refused(folder):
    run_all(folder)
    given = options(folder, "teacher", "teacher")
    given.set = ["samples=16"]  # trained on
    commands.train(given, Toy())
    given = options(folder, "first", "trajectory")
    given.set = ["samples=16"]
    with pytest.raises(ValueError, match=r"00000\.pt .*teacher's samples 8 \(now 16\)"):
        commands.train(given, Toy())


def test_a_run_goes_on_with_another_rate(folder):
    run_all(folder)
    given = options(folder, "second", "match")
    given.set = ["adam_rate=1e-6", "samples=16"]
    commands.train(given, Toy())
    (optimizer,) = load_checkpoint(folder / "second.pt")["task"]["optimizers"]
    assert optimizer["param_groups"][0]["peak"] == 1e-6


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


def test_too_little_memory_is_said_before_anything_is_trained(folder):
    given = options(folder, "teacher", "teacher")
    given.set = ["batch=1000000000"]
    with pytest.raises(ValueError, match=r"Training takes about \d+\.\d+ GB .* smaller .*batch"):
        commands.train(given, Toy())
    assert not (folder / "teacher.pt").exists()


def test_a_checkpoint_of_other_settings_is_refused(folder):
    run_all(folder)
    given = options(folder, "second", "match")
    given.set = ["renoise=random", "samples=16"]
    with pytest.raises(ValueError, match=r"renoise shared \(now random\)"):
        commands.train(given, Toy())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"stage": "magic"}', "expected one of align, teacher, either, trajectory, match"),
        (
            '{"stage": "match", "settings": {"renoize": 1}}',
            "no setting renoize. There are .*renoise",
        ),
        ('{"stage": "match"}', "does not say samples"),
        ('{"stage": "match", "samples": 1}', "does not say teacher"),
        ('{"stage": "match", "samples": 1, "sed": 1}', "a run has no sed"),
        ('{"stage": "match", "samples": 1, "name": "a"}', "a run has no name"),
        ('{"stage": "teacher", "samples": "16"}', "samples is '16': expected a whole number"),
        ('{"stage": ["match"], "samples": 1}', r"stage is \['match'\], expected one of"),
        ('{"stage": "match", "settings": []}', r"settings are \[\], expected an object"),
        ('{"stage": ', r"a\.json is no JSON object: Expecting value"),
        ("[1]", r"a\.json is no JSON object"),
    ],
)
def test_a_wrong_file_is_told_what_it_may_say(tmp_path, text, told):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        runs.read_run(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("second", "batch=four", "batch is 'four': expected a whole number from 1 on"),
        ("second", "batch", "--set batch: expected KEY=VALUE"),
        ("second", "batch=1.5", "batch is 1.5: expected a whole number"),
        ("second", "batch=true", "batch is True: expected a whole number"),
        ("second", "samples=0", "samples is 0: expected a whole number from 1 on"),
        ("second", 'sigmas=[1,"a",0]', "sigmas is .*: expected a list of numbers"),
        ("second", "branch=0.5", "branch is 0.5: expected a list of 2 numbers"),
        ("second", "branch=[1]", "expected a list of 2 numbers"),
        ("second", "proxy_steps=0", "proxy_steps is 0"),
        ("second", "adam_rate=NaN", "adam_rate is nan: expected a number from 0 to 1"),
        ("second", "plateau=1", "plateau is 1.* from 0 to 0.999"),
        ("second", "clip=0", "clip is 0.*: expected a number above 0"),
        ("second", "seed=-1", "seed is -1"),
        ("first", "mend=maybe", "mend is 'maybe': expected true or false"),
        ("first", "states=3", "states is 3: expected a text or null"),
        ("teacher", "learn=3", "learn is 3: expected a text or a list of texts"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_told(folder, stage, change, told):
    with pytest.raises(ValueError, match=told):
        runs.read_run(folder / f"{stage}.json", None, [change])


def test_whole_numbers_do_for_floats_and_lists_for_tuples(folder):
    changes = ["guidance=3", "sigmas=[1,0.5,0]"]
    run = runs.read_run(folder / "first.json", None, changes)
    assert run.settings.guidance == 3.0 and run.settings.sigmas == (1.0, 0.5, 0.0)


def test_weights_that_are_no_numbers_are_named(folder):
    run_all(folder)
    state = load_checkpoint(folder / "second.pt")
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    state["task"]["weights"][name][0, 0] = float("nan")
    torch.save(state, folder / "second.pt")
    with pytest.raises(ValueError, match=rf"second\.pt: .*{name} holds NaN"):
        commands.train(options(folder, "third", "match"), Toy())
    with pytest.raises(ValueError, match=f"{name} holds NaN"):
        kept.load_model(folder, "second", Toy())


def test_nothing_that_was_trained_is_adopted_over(folder):
    given = options(folder, "teacher", "adopt", shipped="toy")
    commands.adopt(given, Toy())
    commands.adopt(given, Toy())  # the same again
    (folder / "teacher.pt").unlink()
    commands.train(options(folder, "teacher", "teacher"), Toy())
    before = (folder / "teacher.pt").read_bytes()
    with pytest.raises(ValueError, match=r"teacher\.pt was trained here"):
        commands.adopt(given, Toy())
    assert (folder / "teacher.pt").read_bytes() == before
    with pytest.raises(ValueError, match="a match says no sizes"):
        commands.adopt(options(folder, "second", "adopt", shipped="toy"), Toy())


@pytest.mark.parametrize("ratio", [-0.1, 2.0, float("nan")])
def test_a_ratio_that_is_no_share_is_refused(folder, ratio):
    run_all(folder)
    scored = {"captions": 3, "encoders": "both"}
    with pytest.raises(ValueError, match=r"ratio is .*: expected a share from 0 to 1"):
        commands.merge(options(folder, "third", "merge", ratio=ratio, **scored), Toy())
    assert not (folder / "third.pt").exists()


def test_names_what_is_missing(folder):
    with pytest.raises(ValueError, match=r"nothing\.json does not exist.*match.*teacher"):
        runs.read_run("nothing")
    with pytest.raises(FileNotFoundError, match="train the run teacher first"):
        commands.train(options(folder, "second", "match"), Toy())
    torch.save({"task": {}, "config": {"rank": 4}}, folder / "lora.pt")  # of a --model
    with pytest.raises(ValueError, match=r"lora\.pt is no checkpoint of a run of the miniature"):
        kept.checkpoint(folder, "lora")


class Empty(Toy):
    def batch(self, size, encoders, index):
        return torch.zeros(0, *toys.SHAPE), torch.zeros(0, encoders, 77, dtype=torch.long)


class Wordless(Toy):
    def batch(self, size, encoders, index):
        return super().batch(size, encoders, index)[0], torch.zeros(0, encoders, 77)


@pytest.mark.parametrize("dataset", [Empty(), Wordless()])
def test_a_data_set_without_pictures_or_words_is_refused(folder, dataset):
    with pytest.raises(ValueError, match="as many captions as pictures"):
        commands.train(options(folder, "teacher", "teacher"), dataset)


@pytest.mark.parametrize("path", sorted(runs.CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_configurations_that_come_with_it_are_readable(path):
    assert runs.read_run(path.stem).samples > 0


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


def test_a_student_is_not_adopted_as_its_own_teacher(folder):
    commands.train(options(folder, "teacher", "teacher"), Toy())
    given = options(folder, "teacher", "adopt", shipped="student")
    given.name, given.set = "ready", ["teacher=ready"]
    with pytest.raises(ValueError, match="student is a student of the run ready"):
        commands.adopt(given, Toy())
    given.set = []
    commands.adopt(given, Toy())
    given.name, given.set = "again", ["teacher=ready"]
    with pytest.raises(ValueError, match=r"ready\.pt is no teacher's"):
        commands.adopt(given, Toy())


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
