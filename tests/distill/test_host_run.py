"""The stages on a MODEL, from files: the demo's, which ship with the pack."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fewstep import run
from fewstep.distill import few_step_lora, host_run
from fewstep.distill.loop import Budget, load_checkpoint, train
from fewstep.host.loading import load_diffusion_model
from fewstep.host.training import training
from fewstep.tests.distill.test_folder import picture
from PIL import Image
from safetensors.torch import load_file

MODELS = run.ROOT / "demo" / "models"
MODEL = MODELS / "diffusion_models" / "fewstep-demo.gguf"
SETTINGS = ["rank=2", "sigmas=[1, 0.5, 0]", "teacher_steps=2", "trajectories=1", "rate=1e-3"]

ALL = ("steps=2", "guidance=2", "optimizer=adamw", "dtype=bf16", "recompute=false")


def options(folder, command="trajectory", settings=("steps=2", "guidance=2"), **others):
    given = {
        "command": command, "name": "run", "folder": folder, "set": [*SETTINGS, *settings],
        "model": MODEL, "text_encoder": [MODELS / "text_encoders" / "fewstep-demo-clip-l.gguf"],
        "vae": MODELS / "vae" / "fewstep-demo-vae.gguf", "clip_type": "sd3", "images": None,
        "prompts": folder / "prompts.txt", "size": (32, 32), "negative": "", "start": None,
        "sheet_minutes": 5.0, "device": "cpu", "dry_run": False,
    }  # fmt: skip
    (folder / "prompts.txt").write_text("a red circle on a blue background\na green square")
    return Namespace(**(given | others))


def pictures(folder):
    (folder / "pictures").mkdir()
    picture(folder / "pictures" / "a.png", size=(35, 32))
    picture(folder / "pictures" / "b.png", size=(32, 32), color=(0, 255, 0), caption="green")
    return folder / "pictures"


def test_prompts_become_a_lora_and_a_second_run_goes_on(tmp_path, caplog):
    path = host_run.run(options(tmp_path, settings=ALL))
    lora = load_file(path)
    assert any(value.any() for name, value in lora.items() if "lora_up" in name)
    assert [p.name for p in (tmp_path / "run-states").iterdir()] == ["00000.pt"]
    kept = load_checkpoint(tmp_path / "run-data.pt")
    assert len(kept["positive"]) == 2 and "latents" not in kept
    again = host_run.run(
        options(tmp_path, settings=ALL, text_encoder=None)
    )  # nothing is encoded again
    assert all(torch.equal(value, lora[name]) for name, value in load_file(again).items())


def test_a_dry_run_tells_what_a_run_would_take_and_keeps_nothing(tmp_path, capsys):
    assert host_run.run(options(tmp_path, settings=["steps=60"], dry_run=True)) is None
    assert re.search(r"rank: 2\n.*60 steps of 1 samples, \d", capsys.readouterr().out, re.S)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_trajectories_of_other_prompts_are_refused(tmp_path):
    host_run.run(options(tmp_path))
    for name in ("run-data.pt", "run.pt"):  # as their own refusals say
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"run-states/00000\.pt .*prompts"):
        host_run.run(options(tmp_path, settings=["steps=4", "guidance=2"], negative="blurred"))


def test_a_size_that_the_model_does_not_take_is_told_and_another_goes(tmp_path):
    with pytest.raises(ValueError, match=r"takes no latents of size 16x128x128: .*smaller ones"):
        host_run.run(options(tmp_path, size=None))
    assert host_run.run(options(tmp_path)).exists()  # prompts are not encoded for a size


def test_a_name_of_what_another_run_keeps_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--name a-data: a-data\.pt would be what another run"):
        host_run.run(options(tmp_path, name="a-data"))


def test_an_optimizer_that_there_is_not_is_told_first(tmp_path):
    with pytest.raises(ValueError, match="optimizer is 'sgd': expected one of adamw, adamw8bit"):
        host_run.run(options(tmp_path, settings=["optimizer=sgd"], model=tmp_path / "none"))


def test_a_run_is_made_longer(tmp_path):
    host_run.run(options(tmp_path))
    host_run.run(options(tmp_path, settings=["steps=4", "guidance=2"]))
    assert load_checkpoint(tmp_path / "run.pt")["done"]["steps"] == 4
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]  # each end is told


def test_a_run_leaves_losses_and_sketches(tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.distill.loop.LOG_STEPS", 1)
    host_run.run(options(tmp_path, sheet_minutes=0.0))
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    (sheet, _) = (tmp_path / "sheets" / "run").glob("*.png")
    assert Image.open(sheet).size == (4, 4)


def test_pictures_with_captions_and_a_lora_to_go_on_from(tmp_path):
    first = host_run.run(options(tmp_path))
    given = {"images": pictures(tmp_path), "prompts": None, "size": None, "start": first}
    path = host_run.run(options(tmp_path, "match", ["steps=2", "guidance=1"], name="two", **given))
    assert load_file(path).keys() == load_file(first).keys()
    assert load_checkpoint(tmp_path / "two-data.pt")["latents"].shape == (2, 16, 4, 4)


def test_branches_of_a_lora_merge_exactly(tmp_path):
    """What the merge adds to a weight is the mean of what the branches add, by their shares."""
    settings = ["steps=2", "guidance=2", "proxy_steps=1", "sigmas=[1, 0.75, 0.5, 0]"]
    first = host_run.run(options(tmp_path, settings=["steps=2", settings[-1]]))
    given = {"name": "two", "start": first, "ratio": 0.75}
    path = host_run.run(options(tmp_path, "split", settings, **given))
    low, high = (load_file(tmp_path / f"two-{part}.safetensors") for part in ("low", "high"))
    merged, seen = load_file(path), 0

    def added(lora, name):
        up, down = (lora[f"{name}.lora_{part}.weight"].float() for part in ("up", "down"))
        return up @ down * float(lora[f"{name}.alpha"]) / len(down)

    for name in (key.removesuffix(".alpha") for key in merged if key.endswith(".alpha")):
        expected = torch.lerp(added(low, name), added(high, name), 0.75)
        off = (added(merged, name) - expected).norm()
        assert off <= 0.02 * expected.norm(), name  # factors are kept in bfloat16
        seen += not torch.equal(added(low, name), added(high, name))
    assert seen > 10
    assert [p.name for p in tmp_path.glob("two-data.pt")] == ["two-data.pt"]  # encoded once
    assert not list(tmp_path.glob("two-*-data.pt"))


def test_whole_weights_learn_and_merge(tmp_path):
    settings = ["rank=0", "steps=2", "guidance=2", "proxy_steps=1", "sigmas=[1, 0.75, 0.5, 0]"]
    first = host_run.run(options(tmp_path, settings=settings))
    learned = load_file(first)
    assert {key.rpartition(".")[2] for key in learned} == {"diff", "diff_b"}
    assert sum(value.any().item() for value in learned.values()) > 20
    given = {"name": "two", "start": first, "ratio": 0.75}
    merged = load_file(host_run.run(options(tmp_path, "split", settings, **given)))
    low, high = (load_file(tmp_path / f"two-{part}.safetensors") for part in ("low", "high"))
    for name, value in merged.items():
        expected = torch.lerp(low[name].float(), high[name].float(), 0.75)
        torch.testing.assert_close(value.float(), expected, rtol=2**-7, atol=1e-6)


def test_a_split_needs_a_student(tmp_path):
    with pytest.raises(ValueError, match="split goes on from a student: pass its LoRA as --start"):
        host_run.run(options(tmp_path, "split", ratio=0.5))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"prompts": None}, "Pass --images FOLDER or --prompts FILE, just one"),
        ({"text_encoder": None}, "the prompts need --text-encoder"),
        ({"settings": ["stepz=2"]}, "no setting stepz. There are .*steps"),
        ({"settings": ["dtype=fp8"]}, "dtype is 'fp8': expected one of model, bf16, fp32"),
        ({"settings": ["rank=-1"]}, "rank is -1: expected a whole number from 0 on"),
        ({"settings": ["sigmas=[0.9, 0]"]}, "starts at 1"),
        ({"size": (0, 32)}, "--size is 0 32: each side needs 16 to 16384 pixels"),
        ({"size": (32, 80000)}, "--size is 32 80000: each side needs 16 to 16384 pixels"),
        ({"size": (32, -8)}, "--size is 32 -8"),
        ({"size": (36, 32)}, "--size is 36 32: .*whole eights"),
        ({"model": Path("gone.gguf")}, r"there is no file gone\.gguf"),
        ({"clip_type": "foo"}, "no clip type foo: expected one of sd3, .*flux"),
        ({"text_encoder": [Path("gone.gguf")]}, r"there is no file gone\.gguf"),
        ({"start": Path("gone.safetensors")}, r"there is no file gone\.safetensors, the LoRA"),
        ({"start": MODEL}, r"fewstep-demo\.gguf: the LoRA to start from is no \.safetensors"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        host_run.run(options(tmp_path, **changes))


def test_other_prompts_under_the_same_name_are_refused(tmp_path):
    host_run.run(options(tmp_path))
    given = options(tmp_path, negative="blurred")
    with pytest.raises(
        ValueError, match=r"run-data\.pt was made with another configuration: texts"
    ):
        host_run.run(given)


def test_other_encoders_or_another_vae_under_the_same_name_are_refused(tmp_path):
    given = options(tmp_path, images=pictures(tmp_path), prompts=None)
    kept = tmp_path / "run-data.pt"
    host_run.dataset(given, kept)
    other = tmp_path / given.vae.name
    other.write_bytes(given.vae.read_bytes() + b" ")
    for changes, key in (
        ({"text_encoder": [other]}, "text_encoder"),
        ({"clip_type": "flux"}, "clip_type"),
        ({"vae": other}, "vae"),
    ):
        with pytest.raises(ValueError, match=rf"run-data\.pt was made .*: {key} "):
            host_run.dataset(Namespace(**(vars(given) | changes)), kept)
    host_run.dataset(Namespace(**(vars(given) | {"text_encoder": None, "vae": None})), kept)


def test_other_data_under_a_runs_name_are_refused(tmp_path):
    given = {"images": pictures(tmp_path), "prompts": None}
    host_run.run(options(tmp_path, "match", ["steps=2", "guidance=1"], **given))
    (tmp_path / "run-data.pt").unlink()
    picture(tmp_path / "pictures" / "a.png", size=(35, 32), color=(0, 0, 255))
    with pytest.raises(ValueError, match=r"run\.pt was made with another configuration: data"):
        host_run.run(options(tmp_path, "match", ["steps=4", "guidance=1"], **given))


@pytest.mark.parametrize("content", [b"", b"text", (1 << 20).to_bytes(8, "little") + b'{"a":'])
def test_a_start_that_is_no_safetensors_is_named(tmp_path, content):
    (tmp_path / "lora.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"lora\.safetensors is no whole safetensors file"):
        host_run.run(options(tmp_path, start=tmp_path / "lora.safetensors"))


def test_a_trajectory_that_is_not_finite_is_not_written_and_named_on_disk(tmp_path, monkeypatch):
    walk = few_step_lora.TrajectoryTask._walk_of_teacher
    monkeypatch.setattr(
        few_step_lora.TrajectoryTask, "_walk_of_teacher", lambda *given: 1e6 * walk(*given)
    )
    with pytest.raises(ValueError, match="the teacher's trajectory 0 is not finite, and not kept"):
        host_run.run(options(tmp_path))
    path = tmp_path / "run-states" / "00000.pt"
    assert not path.exists()
    monkeypatch.undo()
    host_run.run(options(tmp_path))
    kept = load_checkpoint(path)
    kept["states"][1, 0, 0, 0, 0] = float("nan")
    torch.save(kept, path)
    with pytest.raises(ValueError, match=r"00000\.pt holds states that are not finite: delete it"):
        host_run.run(options(tmp_path, settings=["steps=4", "guidance=2"]))


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("method", few_step_lora.METHODS)
def test_a_run_cut_anywhere_goes_on_to_the_same_weights(tmp_path, method, rank):
    plan = few_step_lora.Plan(
        (1.0, 0.5, 0.0), method, steps=4, rank=rank, batch=2, teacher_steps=2, trajectories=2
    )
    cond = [torch.randn(1, 7, 4096), {"pooled_output": torch.randn(1, 1408)}]
    model, ends = load_diffusion_model(str(MODEL)), []
    with training(model, [cond], None, (16, 4, 4), **plan.training()) as backbone:
        for cut in (None, 2):
            task = few_step_lora.build(plan, backbone, torch.zeros(1, 16, 4, 4), tmp_path / "s")
            path = tmp_path / f"{cut}.pt"
            if cut:
                for i in range(cut):
                    task.step(i, i / plan.steps)
                done = {"steps": cut, "samples": cut * plan.batch, "seconds": 1.0}
                torch.save({"task": task.state_dict(), "done": done}, path)
                task = few_step_lora.build(plan, backbone, torch.zeros(1, 16, 4, 4), tmp_path / "s")
            train(task, path, Budget(samples=plan.steps * plan.batch))
            ends.append(task.weights())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
