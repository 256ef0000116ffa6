"""Students of a toy teacher: what they regress onto, what they share, how they go on."""

from functools import partial

import comfy.lora
import pytest
import torch
from fewstep.distill.backbone import Copies
from fewstep.distill.loop import Budget, load_checkpoint, train
from fewstep.distill.lora import add_lora, as_file
from fewstep.distill.optimize import autocast
from fewstep.distill.student import StudentConfig
from fewstep.distill.style import StyleConfig, StyleTask
from fewstep.host import modules
from fewstep.tests.distill import toys

SAMPLES = 6 * toys.MATCH.batch


def makers(tmp_path):
    return {
        "trajectory": partial(toys.trajectory, tmp_path / "states"),
        "match shared": toys.match,
        "match random": partial(toys.match, renoise="random", restart=0.5),
        "match LoRA": partial(toys.match, rank=2),
    }


@pytest.mark.parametrize("kind", ["trajectory", "match shared", "match random", "match LoRA"])
def test_goes_on_to_the_very_same_weights(tmp_path, kind):
    make, budget = makers(tmp_path)[kind], Budget(samples=SAMPLES)
    whole, cut, again = make(), make(), make()
    train(whole, tmp_path / "whole.pt", budget)
    for i in range(3):
        cut.step(i, i / 6)
    done = {"steps": 3, "samples": SAMPLES // 2, "seconds": 1.0}
    torch.save({"task": cut.state_dict(), "done": done}, tmp_path / "cut.pt")
    train(again, tmp_path / "cut.pt", budget)
    expected, seen = whole.state_dict(), again.state_dict()
    for part in set(expected) & {"student", "ema", "weights", "proxy", "heads"}:
        for name, value in expected[part].items():
            assert torch.equal(value, seen[part][name]), (part, name)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    train(toys.match(), tmp_path / "a.pt", Budget(samples=8), config={"renoise": "shared"})
    with pytest.raises(ValueError, match=r"a\.pt .*renoise shared \(now random\)"):
        train(toys.match(), tmp_path / "a.pt", Budget(samples=8), config={"renoise": "random"})


def test_trajectory_is_the_teachers_with_guidance(tmp_path):
    task = toys.trajectory(tmp_path)
    sample = task._sample(1, torch.Generator())
    states = task._trajectory(1, sample)
    x, told, untold = sample.noise, sample.told, sample.untold
    expected, network = x, task.backbone.teacher.mmdit
    for sigma in (torch.tensor(1.0), torch.tensor(0.95)):  # 8 steps of the teacher for 4
        with torch.no_grad(), autocast(torch.device("cpu")):
            levels = sigma.expand(4)
            with_text = modules.velocity(network, expected, levels, *told).float()
            without = modules.velocity(network, expected, levels, *untold).float()
        expected = expected - 0.05 * (without + 2 * (with_text - without))
    assert states.shape == (5, 4, *toys.SHAPE)
    # half precision on disk, and a batch of eight instead of two of four
    assert torch.allclose(states[1], expected, atol=5e-3)
    assert (states[1] - x).abs().max() > 0.05


def test_trajectories_are_made_once(tmp_path):
    task = toys.trajectory(tmp_path)
    losses = [task.step(i, 0.0).item() for i in range(7)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0000{i}.pt" for i in range(3)]
    (tmp_path / "00001.pt").unlink()
    assert [toys.trajectory(tmp_path).step(0, 0.0).item()] == losses[:1]


def test_trajectories_of_another_kind_are_refused(tmp_path):
    toys.trajectory(tmp_path).step(0, 0.0)
    with pytest.raises(ValueError, match=r"00000\.pt .*guidance 2\.0 \(now 5\.0\)"):
        toys.trajectory(tmp_path, guidance=5.0).step(0, 0.0)
    toys.trajectory(tmp_path, adam_rate=1e-3).step(0, 0.0)  # which changes no trajectory


def test_trajectories_of_four_steps_serve_two(tmp_path):
    four = toys.trajectory(tmp_path)
    sample = four._sample(0, torch.Generator())
    made = four._trajectory(0, sample)
    two = toys.trajectory(tmp_path, sigmas=(1.0, 0.75, 0.0))
    assert torch.equal(two._trajectory(0, sample), made[[0, 2, 4]].half().float())
    with pytest.raises(ValueError, match=r"sigmas .*0\.8"):
        toys.trajectory(tmp_path, sigmas=(1.0, 0.8, 0.0))._trajectory(0, sample)


def test_a_way_is_mended_in_proportion(tmp_path):
    plain = toys.trajectory(tmp_path / "plain")
    sample = plain._sample(2, torch.Generator())
    made = plain._trajectory(2, sample)
    task = toys.trajectory(tmp_path / "plain", lambda number, latents: number - latents, mend=True)
    mended = task._trajectory(2, sample)
    forgotten = toys.trajectory(tmp_path / "plain", lambda *_: 1 / 0, mend=True)
    assert torch.equal(forgotten._trajectory(2, sample), mended)  # kept beside the teacher's end
    assert torch.equal(plain._trajectory(2, sample), made)
    assert torch.equal(mended[0], made[0])  # the noise itself
    assert torch.allclose(mended[-1], 2 - made[-1], atol=2e-3)
    assert torch.allclose(mended[2], made[2] + 0.25 * (2 - 2 * made[-1]), atol=4e-3)  # sigma 0.75
    with pytest.raises(ValueError, match="nothing here knows what a right picture is"):
        toys.trajectory(tmp_path, mend=True)


def test_a_way_is_straight_along_its_chords(tmp_path):
    plain = toys.trajectory(tmp_path / "plain")
    sample = plain._sample(0, torch.Generator())
    made = plain._trajectory(0, sample)
    straight = toys.trajectory(tmp_path / "plain", chords=(1.0, 0.75, 0.0))._trajectory(0, sample)
    assert torch.equal(straight[[0, 2, 4]], made[[0, 2, 4]])  # sigmas 1, 0.75, 0 of five
    assert torch.allclose(straight[1], torch.lerp(made[0], made[2], 0.4), atol=2e-3)  # 0.9
    assert torch.allclose(straight[3], torch.lerp(made[2], made[4], 1 / 3), atol=2e-3)  # 0.5
    for wrong in ((1.0, 0.8, 0.0), (0.9, 0.0)):
        with pytest.raises(ValueError, match="expected levels from 1 to 0 out of"):
            toys.trajectory(tmp_path, chords=wrong)


def test_trajectory_loss_falls(tmp_path):
    task = toys.trajectory(tmp_path)
    losses = [task.step(i, 0.0).item() for i in range(60)]
    assert sum(losses[-9:]) < 0.7 * sum(losses[:9])


def test_weights_are_the_average_alone(tmp_path):
    task = toys.match(ema=0.5)
    for i in range(3):
        task.step(i, 0.0)
    weights, now = task.weights(), task.student.state_dict()
    assert weights.keys() == task.backbone.teacher.mmdit.state_dict().keys()
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    assert torch.equal(weights[name], task.ema[name]) and not torch.equal(weights[name], now[name])


def test_lora_trains_only_itself_and_is_merged():
    task = toys.match(rank=2)
    base = task.backbone.teacher.mmdit.state_dict()
    for i in range(3):
        task.step(i, 0.0)
    weights = task.weights()
    assert weights.keys() == base.keys()
    assert all("parametrizations.weight.0" in name for name in task.ema)
    delta = (
        weights["joint_blocks.0.x_block.mlp.fc1.weight"]
        - base["joint_blocks.0.x_block.mlp.fc1.weight"]
    )
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) == 2
    assert torch.equal(weights["pos_embed"], base["pos_embed"])
    task.step(3, 0.0)  # it goes on


def test_lora_changes_nothing_at_first():
    network = toys.teacher().mmdit
    x, sigma = torch.randn(2, *toys.SHAPE), torch.tensor([0.3, 1.0])
    text = torch.randn(2, 5, 4096), torch.randn(2, 32)
    before = modules.velocity(network, x, sigma, *text)
    assert before.std() > 0.01
    assert torch.allclose(modules.velocity(add_lora(network, 4), x, sigma, *text), before)


@pytest.mark.parametrize("sigmas", [(0.9, 0.5, 0.0), (1.0, 0.5), (1.0, 0.5, 0.7, 0.0)])
def test_a_student_draws_from_noise_to_the_picture(sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        StudentConfig(sigmas=sigmas)


def test_checkpoint_brings_the_weights_that_sample(tmp_path):
    task = toys.match()
    train(task, tmp_path / "m.pt", Budget(samples=8))
    saved = load_checkpoint(tmp_path / "m.pt")["task"]["weights"]
    toys.teacher().mmdit.load_state_dict(saved)
    assert torch.equal(saved["final_layer.linear.weight"], task.ema["final_layer.linear.weight"])


def test_a_loras_file_is_what_the_host_adds():
    """The weights that ComfyUI's loader makes of the file are those that training has."""
    task = toys.match(rank=2)
    for i in range(3):
        task.step(i, 0.0)
    file = as_file(task.ema, 2)
    stems = {name.removesuffix(".alpha") for name in file if name.endswith(".alpha")}
    layers = {f"{stem}": f"{stem.removeprefix('diffusion_model.')}.weight" for stem in stems}
    patches = comfy.lora.load_lora(file, layers)
    assert len(patches) == len(stems) > 10
    base, learned = task.backbone.teacher.mmdit.state_dict(), task.weights()
    for layer, patch in patches.items():
        changed = patch.calculate_weight(
            base[layer].clone(), layer, 1.0, 1.0, None, lambda weight: weight
        )
        assert torch.allclose(changed, learned[layer], atol=1e-4), layer
        assert not torch.equal(changed, base[layer])


def test_a_style_is_learned_by_a_lora(tmp_path):
    """What is asked for is a picture that is darker throughout."""
    config = StyleConfig(batch=4, warmup=2, rank=4, batches=2, style="dark")

    def styled(index):
        return toys.data(index)[1], lambda latents: latents - 1

    backbone = Copies(toys.teacher())
    task = StyleTask(config, backbone, styled, shape=toys.SHAPE)
    losses = [task.step(i, 0.0).item() for i in range(80)]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    assert all("parametrizations" in name for name in task.ema)
    with pytest.raises(ValueError, match="rank is 0: a style is a LoRA"):
        StyleConfig(rank=0)
