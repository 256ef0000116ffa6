"""The whole chain at half the depth and for minutes: what is learned shows."""

import json
from argparse import Namespace

import pytest
import torch
from fewstep.demo.miniature import Miniature
from fewstep.distill import commands, kept, runs
from fewstep.distill.merge import RATIOS
from fewstep.flow import sample_euler, uniform

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TUNED = ["start=null", "learn=", "depth=2", "t5_pieces=0", "compiled=false", "samples=24000"]
TUNED += ["muon_rate=0.002", "adam_rate=0.001", "warmup=50", "ema=0.99"]
STUDENT = ["mend=false", "chords=[]", "teacher_steps=16", "batches=12", "batch=32", "samples=12000"]
MATCH = ["batch=16", "proxy_warmup=10"]
STEPS = 16  # of the teacher


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder, the data, and the losses of each run."""
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("runs")
    dataset, losses = Miniature(), {}
    for name, changes in (
        ("tuned", TUNED),
        ("trajectory", STUDENT),
        ("match", ["start=trajectory", *MATCH, "samples=960"]),
    ):
        known = "teacher" if name == "tuned" else name
        runs.train_run(runs.read_run(name, known, changes), folder, dataset)
        lines = (folder / f"{known}.jsonl").read_text().splitlines()
        losses[known] = [json.loads(line)["loss"] for line in lines]
    return folder, dataset, losses


def test_losses_fall(trained):
    _, _, losses = trained
    assert losses["teacher"][-1] < 0.6 * losses["teacher"][0]
    assert losses["trajectory"][-1] < 0.6 * losses["trajectory"][0]


@torch.no_grad()
def test_the_student_goes_where_many_steps_of_its_teacher_lead(trained):
    folder, dataset, _ = trained
    run = runs.read_run("trajectory", changes=STUDENT)
    task = runs.build(run, folder, dataset)
    sample = task._sample(run.settings.batches - 1, torch.Generator().manual_seed(99))
    noise = torch.randn(sample.noise.shape, generator=torch.Generator().manual_seed(98))

    def guided(x, sigma):
        return x - sigma[:, None, None, None] * task._guided(x, sigma, sample)

    def drawn(name):
        network = kept.load_model(folder, name, dataset).mmdit

        def denoise(x, sigma):
            return x - sigma[:, None, None, None] * task._velocity(network, x, sigma, sample.told)

        return sample_euler(denoise, noise, task.sigmas)

    aim = sample_euler(guided, noise, uniform(STEPS, kept.SHIFT))
    without = (sample_euler(guided, noise, task.sigmas) - aim).square().mean()
    assert (drawn("trajectory") - aim).square().mean() < 0.8 * without
    assert (drawn("match") - aim).square().mean() < without  # it is free to go elsewhere


def test_pictures_come_nearer_to_true_ones(trained):
    folder, dataset, _ = trained

    def distance(name, steps, cfg):
        sigmas, _ = kept.schedule(kept.checkpoint(folder, name)["config"], steps)
        model = kept.load_model(folder, name, dataset)
        return dataset.evaluate(model, sigmas, cfg, 60, "no t5")["frechet"]

    matched = distance("match", 4, 1.0)
    assert matched < distance("teacher", 4, kept.GUIDANCE)
    assert matched < 1.1 * distance("trajectory", 4, 1.0)


def test_branches_are_trained_and_merged_at_the_best_ratio(trained, capsys):
    folder, dataset, _ = trained
    given = {"config": "split", "name": None, "device": "cpu", "folder": folder}
    given |= {"set": ["start=match", *MATCH, "samples=320"], "dry_run": False, "ratio": None}
    given |= {"sheet_minutes": 5.0, "captions": 60, "encoders": "no t5"}
    commands.split(Namespace(**given), dataset)
    commands.merge(Namespace(**given), dataset)
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    scores = {line["ratio"]: (line["overall"], line["right"]) for line in lines}
    assert sorted(scores) == list(RATIOS)
    best = kept.checkpoint(folder, "split")["config"]["ratio"]
    assert scores[best] == max(scores.values())
