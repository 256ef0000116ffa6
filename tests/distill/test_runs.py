"""Runs from a JSON file: every stage end to end on a toy, and what a wrong file is told."""

import json
import re
from argparse import Namespace

import pytest
import torch
from fewstep.distill import commands, kept, runs
from fewstep.distill.loop import load_checkpoint
from fewstep.flow import uniform
from fewstep.tests.distill import toys
from fewstep.tests.distill.toy_runs import SIZES, STUDENT, Toy, options, run_all, write


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


def test_a_teacher_is_drawn_in_fifty_steps_with_guidance():
    sigmas, cfg = kept.schedule({"stage": "teacher"})
    assert len(sigmas) == 51 and cfg == 2.0
    assert torch.equal(kept.schedule({"stage": "teacher"}, 4)[0], uniform(4, 3.0))


def test_only_the_t5_learns_if_asked(folder):
    commands.train(options(folder, "teacher", "teacher"), Toy())
    write(folder, "t5", "teacher", SIZES | {"learn": "t5."}, start="teacher")
    commands.train(options(folder, "t5", "teacher"), Toy())
    before, after = (
        load_checkpoint(folder / f"{name}.pt")["task"]["ema"] for name in ("teacher", "t5")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("t5.") for name in changed)


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
