"""The distilling node in the real host: what it learns, how it is stopped, what it refuses."""

import logging
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_extras.nodes_train import LoraModelLoader, SaveLoRA
from fewstep.distill import few_step_lora
from fewstep.distill.loop import TrainingDiverged
from fewstep.flow import uniform
from fewstep.host import loading, sampling, training
from fewstep.nodes.distilling import FewStepDistill
from fewstep.tests.host import toys

SIDE, SIGMAS = 8, torch.tensor([1.0, 0.75, 0.0])


def prompt(seed):
    draw = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, 7, 4096, generator=draw)
    return [[cond, {"pooled_output": torch.randn(1, 2048, generator=draw)}]]


POSITIVE, NEGATIVE = [prompt(1), prompt(2)], prompt(3)


@pytest.fixture(params=["plain", "gguf"])
def model(request, tmp_path):
    """A random SD3 whose path bends, as it is and from a file of Q8_0."""
    weights = toys.mmdit(depth=2)
    weights = {name: 2 * value for name, value in weights.items()}
    with torch.inference_mode():  # as the host runs its loaders
        if request.param == "plain":
            return comfy.sd.load_diffusion_model_state_dict(weights)
        toys.write(tmp_path / "m.gguf", "sd3", weights)
        return loading.load_diffusion_model(str(tmp_path / "m.gguf"))


def empty(channels=16):
    return {"samples": torch.zeros(1, channels, SIDE, SIDE), "downscale_ratio_spacial": 8}


def distil(model, method="trajectory", steps=40, guidance=2.0, rate=5e-3, rank=8, **others):
    given = {
        "model": [model], "positive": POSITIVE, "latents": [empty()], "sigmas": [SIGMAS],
        "method": [method], "steps": [steps], "guidance": [guidance], "rank": [rank],
        "learning_rate": [rate], "seed": [0], "negative": [NEGATIVE], "batch_size": [4],
        "teacher_steps": [8], "trajectories": [2],
    }  # fmt: skip
    with torch.inference_mode():  # as the host runs its nodes
        return FewStepDistill.execute(**(given | others)).args


def drawn(model, sigmas, cfg=1.0, seed=11):
    sampler = sampling.make_sampler("euler", None)
    with torch.inference_mode():
        return sampling.sample(model, POSITIVE[0], NEGATIVE, empty(), seed, cfg, sampler, sigmas)[
            "samples"
        ]


@pytest.mark.parametrize("rank, rate", [(8, 5e-3), (0, 5e-4)])
def test_what_is_learned_brings_few_steps_nearer_to_the_teachers_many(model, rank, rate):
    before, goal = drawn(model, SIGMAS), drawn(model, uniform(16, 1.0), cfg=2.0)
    lora, losses, steps = distil(model, rank=rank, rate=rate)
    assert steps == len(losses["loss"]) == 40
    assert torch.equal(drawn(model, SIGMAS), before)  # the MODEL is as it was
    student = LoraModelLoader.execute(model, lora, 1.0).args[0]
    error, without = ((d - goal).square().mean() for d in (drawn(student, SIGMAS), before))
    assert error < 0.6 * without
    assert sum(losses["loss"][-8:]) < 0.7 * sum(losses["loss"][:8])


def test_a_straight_way_is_the_nearer_to_it_in_one_step(model):
    goal, errors = drawn(model, uniform(16, 1.0), cfg=2.0), []
    for straight in (False, True):
        lora, _, _ = distil(model, straight=[straight])
        student = LoraModelLoader.execute(model, lora, 1.0).args[0]
        errors.append((drawn(student, torch.tensor([1.0, 0.0])) - goal).square().mean())
    assert errors[1] < 0.8 * errors[0]


def test_matching_goes_on_from_a_lora(model):
    lora, _, _ = distil(model, steps=4)
    again, losses, _ = distil(model, "matching", steps=4, lora=[lora])
    assert again.keys() == lora.keys()
    assert any(not torch.equal(again[name], lora[name]) for name in lora)
    assert all(value.isfinite().all() for value in again.values()) and len(losses["loss"]) == 4
    with pytest.raises(ValueError, match="same model and rank"):
        distil(model, "matching", steps=1, lora=[lora], rank=4)


def test_matching_learns_from_pictures_too(model):
    pictures = [{"samples": torch.randn(2, 16, SIDE, SIDE)}]
    lora, _, _ = distil(
        model, "matching", steps=2, latents=pictures, guidance=1.0, negative=(None,)
    )
    assert all(value.isfinite().all() for value in lora.values())


@pytest.mark.parametrize("rank", [8, 0])
def test_stock_nodes_take_what_it_gives(model, rank):
    lora, _, steps = distil(model, steps=2, rank=rank)
    SaveLoRA.execute(lora, "loras/mine", steps)
    folder = Path(folder_paths.get_output_directory()) / "loras"
    path = max(folder.glob("mine_2_steps_*.safetensors"))
    patched, _ = comfy.sd.load_lora_for_models(
        model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0
    )
    assert len(patched.patches) == (len(lora) // 3 if rank else len(lora))
    assert all(value.dtype == torch.bfloat16 for value in lora.values())


@pytest.fixture
def stopped():
    """What a stopped training leaves in the output folder."""
    folder = Path(folder_paths.get_output_directory()) / "loras"
    for path in folder.glob("fewstep_stopped*"):
        path.unlink()
    return lambda: [path.name for path in folder.glob("fewstep_stopped*")]


def test_the_hosts_stop_ends_it_and_nothing_is_lost(model, stopped, monkeypatch, caplog):
    def press(_self, done, latents=None):
        if done == 3:
            comfy.model_management.interrupt_current_processing()

    before = drawn(model, SIGMAS)
    monkeypatch.setattr(few_step_lora.Progress, "__call__", press)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        distil(model)
    assert stopped() == ["fewstep_stopped_3_steps_00001_.safetensors"]
    assert "stopped after 3 steps" in caplog.text and not comfy.model_management.in_training
    assert torch.equal(drawn(model, SIGMAS), before)


@pytest.mark.parametrize(
    ("broken_at", "told", "names"),
    [
        (0, "step 0 of 40, the first: see whether the model draws", []),
        (4, "step 4 of 40. Nothing is kept; lower the learning rate", []),
        (20, "step 20 of 40. What was learned in 10 steps is kept", ["10"]),  # 20 has not proved
        (21, "step 21 of 40. What was learned in 20 steps is kept", ["20"]),
    ],
)
def test_a_loss_that_is_no_number_is_named_and_the_last_good_kept(
    model, stopped, monkeypatch, broken_at, told, names
):
    whole, calls = few_step_lora.TrajectoryTask._loss, []

    def broken(self, *args):
        calls.append(0)
        return whole(self, *args) * (float("nan") if len(calls) == broken_at + 1 else 1.0)

    monkeypatch.setattr(few_step_lora.TrajectoryTask, "_loss", broken)
    with pytest.raises(TrainingDiverged, match=f"The loss is nan at {told}"):
        distil(model)
    assert stopped() == [f"fewstep_stopped_{steps}_steps_00001_.safetensors" for steps in names]
    for name in stopped():
        path = Path(folder_paths.get_output_directory()) / "loras" / name
        kept = comfy.utils.load_torch_file(str(path))
        assert all(value.isfinite().all() for value in kept.values())


def test_progress_counts_steps_and_shows_what_the_student_draws(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: seen.append((value, total, preview)),
    )  # fmt: skip
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    distil(model, steps=3)
    assert [row[:2] for row in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [row[2][1].size for row in seen] == 3 * [(SIDE, SIDE)]


def test_what_it_is_told_wrongly_is_answered(model):
    with pytest.raises(ValueError, match="guidance 2 needs a negative prompt"):
        distil(model, negative=(None,))
    with pytest.raises(ValueError, match="starts at 1 and ends at 0"):
        distil(model, sigmas=[torch.tensor([0.9, 0.5, 0.0])])
    with pytest.raises(ValueError, match=r"several sizes, 16x16x8, 16x8x8"):
        distil(model, latents=[empty(), {"samples": torch.zeros(1, 16, 16, SIDE)}])
    with pytest.raises(ValueError, match="3 latents and 2 prompts"):
        distil(model, latents=[{"samples": torch.randn(3, 16, SIDE, SIDE)}])
    for shape in ((1, 4, SIDE, SIDE), (1, 16, 2, SIDE, SIDE)):
        with pytest.raises(ValueError, match="the model's have 16 channels in 3 dimensions"):
            distil(model, latents=[{"samples": torch.randn(shape)}])
    with pytest.raises(ValueError, match="latents hold NaN or infinity"):
        distil(model, latents=[{"samples": torch.full((1, 16, SIDE, SIDE), float("nan"))}])
    assert distil(model, steps=1, latents=[empty(channels=4)])[2] == 1


def test_a_model_of_another_kind_is_refused(monkeypatch, model):
    class Eps:
        pass

    other = model.clone()
    other.add_object_patch("model_sampling", Eps())
    with pytest.raises(ValueError, match="not a flow model"):
        distil(other)


def test_memory_is_told_before_it_trains(model, caplog):
    with caplog.at_level(logging.INFO):
        distil(model, steps=1)
    assert "GB of cpu beside the model" in caplog.text
    with pytest.raises(ValueError, match="take a smaller latent or batch, a LoRA of a lower rank"):
        distil(model, batch_size=[10**9])
    assert training.management.in_training is False
