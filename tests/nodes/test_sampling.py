"""The sampling nodes against the host's own samplers, on a tiny SD3."""

import json
import logging
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy_extras.nodes_custom_sampler import SamplerCustom
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from fewstep.flow import PRESETS, Preset, find_preset, sample_euler, uniform
from fewstep.host import sampling
from fewstep.nodes.sampling import FewStepSample, FewStepSampler, FewStepSchedule
from fewstep.tests.host import toys

CHECKPOINT = Preset("mine", "Mine", 3, rows=((1, 0.8, 0.3, 0), (1, 0.6, 0)), shift=3.0)
AUTO = sampling.AUTO


@pytest.fixture(scope="module")
def plain():
    """A tiny SD3 without few-step metadata."""
    return comfy.sd.load_diffusion_model_state_dict(toys.mmdit(depth=1))


@pytest.fixture
def model(plain):
    """The same with a checkpoint's preset, as our loader attaches it."""
    model = plain.clone()
    model.set_attachments("fewstep", CHECKPOINT)
    return model


def prompt(seed):
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, 7, 4096, generator=generator)
    return [[cond, {"pooled_output": torch.randn(1, 2048, generator=generator)}]]


POSITIVE, NEGATIVE = prompt(1), prompt(2)


def empty(side=16, batch=1, channels=16):
    return {"samples": torch.zeros(batch, channels, side, side), "downscale_ratio_spacial": 8}


def schedule(preset=AUTO, steps=0, denoise=1.0, shift=0.0, **inputs):
    return FewStepSchedule.execute(preset, steps, denoise, shift, **inputs).args[0]


def sampler(rule="auto", preset=AUTO, **inputs):
    return FewStepSampler.execute(rule, preset, **inputs).args[0]


def draw(model, latent=None, seed=7, steps=0, cfg=0.0, denoise=1.0, preset=AUTO, rule="auto", **kw):
    latent = latent or empty()
    out = FewStepSample.execute(
        model, POSITIVE, latent, seed, steps, cfg, denoise, preset, rule, **kw
    )
    return out.args[0]


def stock(model, sampler, sigmas, latent=None, seed=7, cfg=1.0):
    latent = latent or empty()
    out = SamplerCustom.execute(model, True, seed, cfg, POSITIVE, NEGATIVE, sampler, sigmas, latent)
    return out.args[0]["samples"]


# --- step rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_euler_equals_the_hosts_bit_for_bit(preset):
    def curved(x, sigma):
        return torch.tanh(x * 1.7 + sigma.view(-1, 1, 1, 1))

    start = torch.randn(2, 16, 32, 32)
    sigmas = preset.sigmas(tokens=4096)
    theirs = k_diffusion.sample_euler(curved, start, sigmas, disable=True)
    assert torch.equal(sample_euler(curved, start, sigmas), theirs)


@pytest.mark.parametrize("rule, host", [("euler", "euler"), ("renoise", "lcm")])
@pytest.mark.parametrize("preset", ["sd3.5-large-turbo", "swd-sd3.5"])
def test_rules_equal_the_hosts_bit_for_bit(plain, rule, host, preset):
    sigmas = find_preset(preset).sigmas()
    ours = stock(plain, comfy.samplers.KSAMPLER(sampling.RULES[rule]), sigmas)
    theirs = stock(plain, comfy.samplers.ksampler(host), sigmas)
    assert ours.isfinite().all() and ours.std() > 0.01
    assert torch.equal(ours, theirs)


def test_rule_comes_from_preset_or_hand(model):
    def function(**inputs):
        return sampler(**inputs).sampler_function.__name__

    assert function(model=model) == "sample_euler"
    assert function(preset="senseflow-sd3.5") == "sample_renoise"
    assert function(preset="senseflow-sd3.5", rule="euler") == "sample_euler"
    assert function(rule="renoise") == "sample_renoise"  # by hand: no model needed
    assert function(rule="euler", model=model) == "sample_euler"


def test_swd_grows_the_latent(plain):
    sizes = []

    def watch(apply, args):
        sizes.append(tuple(args["input"].shape[-2:]))
        return apply(args["input"], args["timestep"], **args["c"])

    watched = plain.clone()
    watched.set_model_unet_function_wrapper(watch)
    out = draw(watched, preset="swd-sd3.5", latent=empty(16))
    assert sizes == [(8, 8), (10, 10), (12, 12), (16, 16)]
    assert out["samples"].shape == (1, 16, 16, 16)
    sizes.clear()
    draw(watched, preset="swd-sd3.5", latent=empty(16), rule="euler")
    assert sizes == [(16, 16)] * 4


# --- schedules -------------------------------------------------------------------------------


def test_schedule_of_the_checkpoint(model):
    assert schedule(model=model).tolist() == list(CHECKPOINT.rows[0])
    assert schedule(model=model, steps=2).tolist() == list(CHECKPOINT.rows[1])
    assert len(schedule(model=model, steps=5)) == 6
    assert torch.equal(schedule("flux.1-schnell", shift=2.0), uniform(4, 2.0))
    assert schedule(model=model, denoise=0.5)[0] < 0.7


def test_typed_sigmas_win(model):
    assert torch.equal(schedule(sigmas="1, .9, .5, 0"), torch.tensor([1, 0.9, 0.5, 0]))
    half = schedule(sigmas="1, .9, .5, 0", denoise=0.5, model=model, steps=9)
    assert len(half) == 4 and half[0] == pytest.approx(0.7)


def test_denoise_zero_gives_the_latent_back(model):
    latent = {"samples": torch.randn(1, 16, 16, 16)}
    assert schedule(model=model, denoise=0.0).shape == (0,)
    assert torch.equal(draw(model, latent, denoise=0.0)["samples"], latent["samples"])


@pytest.mark.parametrize(
    "latent, tokens",
    [
        ({"samples": torch.zeros(1, 128, 64, 64)}, 4096),  # Empty Flux 2 Latent, 1024²
        ({"samples": torch.zeros(1, 4, 128, 128), "downscale_ratio_spacial": 8}, 4096),
        ({"samples": torch.zeros(1, 16, 64, 128)}, 2048),
    ],
)
def test_flux2_counts_tokens_of_16_pixels(latent, tokens):
    expected = find_preset("flux.2-klein-4b").sigmas(tokens=tokens)
    assert torch.equal(schedule("flux.2-klein-4b", latent=latent), expected)


def test_a_plain_file_asks_for_a_preset_instead_of_guessing(plain):
    for node in (lambda: schedule(model=plain), lambda: sampler(model=plain), lambda: draw(plain)):
        with pytest.raises(ValueError, match="Choose the preset of your checkpoint by name"):
            node()
    for node in (schedule, sampler):
        with pytest.raises(ValueError, match="needs the model: connect it"):
            node()


def test_models_that_are_not_flow_models_are_refused(plain):
    class Eps(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    eps = plain.clone()
    eps.add_object_patch("model_sampling", Eps(None))
    for node in (
        lambda: schedule("flux.1-schnell", model=eps),
        lambda: sampler("euler", model=eps),
        lambda: draw(eps, preset="flux.1-schnell"),
    ):
        with pytest.raises(ValueError, match=r"not a flow model.*ComfyUI's own nodes"):
            node()


def test_the_preset_survives_clones_loras_and_patches(model):
    key = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    lora = {
        f"{key}.lora_up.weight": torch.ones(64, 1),
        f"{key}.lora_down.weight": torch.ones(1, 64),
    }
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert with_lora.patches
    shifted = ModelSamplingSD3().patch(with_lora, 5.0)[0]
    for patched in (model.clone(), with_lora, shifted):
        assert schedule(model=patched).tolist() == list(CHECKPOINT.rows[0])
        draw(patched)


# --- the whole thing in one box --------------------------------------------------------------


def count_calls(model):
    """A clone that counts model calls and their batch sizes."""
    batches = []

    def count(apply, args):
        batches.append(len(args["input"]))
        return apply(args["input"], args["timestep"], **args["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(count)
    return model, batches


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_cfg_one_costs_one_call_a_step(model, negative):
    counted, batches = count_calls(model)
    draw(counted, negative=negative)
    assert batches == [1, 1, 1]


def test_other_cfg_runs_both_prompts_and_matters(model):
    counted, batches = count_calls(model)
    out = draw(counted, cfg=3.0, negative=NEGATIVE)
    assert sum(batches) == 6
    assert not torch.equal(out["samples"], draw(model)["samples"])
    with pytest.raises(ValueError, match="cfg 3 needs a negative prompt"):
        draw(model, cfg=3.0)


def test_cfg_zero_is_the_checkpoints_own(plain):
    guided = plain.clone()
    guided.set_attachments("fewstep", Preset("m", "M", 2, rows=((1, 0.5, 0),), cfg=2.0))
    ours = draw(guided, negative=NEGATIVE)["samples"]
    theirs = stock(guided, comfy.samplers.ksampler("euler"), schedule(model=guided), cfg=2.0)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("preset", ["flux.1-schnell", "swd-sd3.5", "senseflow-sd3.5"])
def test_the_box_is_schedule_plus_sampler_plus_stock(plain, preset):
    parts = stock(plain, sampler(preset=preset), schedule(preset))
    assert torch.equal(draw(plain, preset=preset)["samples"], parts)


def test_an_eight_pixel_latent_of_four_channels_is_mended(model):
    out = draw(model, empty(channels=4))
    assert torch.equal(out["samples"], draw(model, empty())["samples"])
    assert "downscale_ratio_spacial" not in out


def test_batch_index_picks_the_noise(model):
    batch = draw(model, empty(batch=3))["samples"]
    third = draw(model, empty() | {"batch_index": [2]})
    # the batch goes through larger matrix products, which round differently
    torch.testing.assert_close(third["samples"], batch[2:], atol=1e-4, rtol=1e-4)
    assert third["batch_index"] == [2]


def test_a_mask_keeps_the_rest(model):
    latent = {"samples": torch.randn(1, 16, 16, 16), "noise_mask": torch.zeros(1, 1, 128, 128)}
    latent["noise_mask"][..., :64, :] = 1
    out = draw(model, latent)["samples"]
    # the kept half goes through the latent's scale and back
    torch.testing.assert_close(out[..., 8:, :], latent["samples"][..., 8:, :], atol=1e-5, rtol=0)
    assert (out - latent["samples"])[..., :8, :].abs().min() > 0
    with pytest.raises(ValueError, match="Remove the mask"):
        draw(model, latent, preset="swd-sd3.5")


def test_low_denoise_keeps_more_of_the_picture(model):
    latent = {"samples": torch.randn(1, 16, 16, 16)}

    def change(denoise):
        return (draw(model, latent, denoise=denoise)["samples"] - latent["samples"]).std()

    assert change(0.1) < change(0.5) < change(1.0)


def test_progress_counts_the_steps(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: seen.append((value, total)),
    )  # fmt: skip
    draw(model, steps=2)
    assert seen == [(1, 2), (2, 2)]


def test_interrupt_stops_and_the_next_run_works(model):
    counted, batches = count_calls(model)

    def interrupt(apply, args):
        batches.append(1)
        comfy.model_management.interrupt_current_processing()
        return apply(args["input"], args["timestep"], **args["c"])

    counted.set_model_unet_function_wrapper(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(counted)
    assert len(batches) == 1
    assert draw(model)["samples"].isfinite().all()


def test_the_same_seed_draws_the_same(model):
    for rule in ("euler", "renoise"):
        one, again = (draw(model, rule=rule)["samples"] for _ in range(2))
        assert torch.equal(one, again)
        assert not torch.equal(one, draw(model, seed=8, rule=rule)["samples"])
    draw(model, seed=2**64 - 1, rule="renoise")


# --- the user's own presets ------------------------------------------------------------------


@pytest.fixture
def presets_file():
    path = Path(folder_paths.get_user_directory()) / sampling.PRESETS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    path.unlink(missing_ok=True)


def write(path, name="my-turbo", sigmas=(1, 0.5, 0)):
    path.write_text(json.dumps({name: {"sigmas": [sigmas]}}), "utf-8")


def options(node):
    return node.INPUT_TYPES()["required"]["preset"][1]["options"]


@pytest.mark.parametrize("node", [FewStepSchedule, FewStepSampler, FewStepSample])
def test_own_rows_are_offered_without_a_restart(node, presets_file):
    assert "my-turbo" not in options(node)
    write(presets_file)
    assert options(node) == [AUTO, *(preset.name for preset in PRESETS), "my-turbo"]
    assert node.validate_inputs(preset="my-turbo") is True
    assert schedule("my-turbo").tolist() == [1, 0.5, 0]


def test_an_edited_row_runs_again(presets_file):
    write(presets_file)
    before = FewStepSchedule.fingerprint_inputs(preset="my-turbo", steps=0)
    assert before == FewStepSchedule.fingerprint_inputs(preset="my-turbo", steps=0)
    write(presets_file, sigmas=(1, 0.25, 0))
    assert before != FewStepSchedule.fingerprint_inputs(preset="my-turbo", steps=0)


def test_a_faulty_file_is_named_and_harms_nothing_else(presets_file, caplog):
    presets_file.write_text("{", "utf-8")
    with caplog.at_level(logging.WARNING):
        assert options(FewStepSchedule) == [AUTO, *(preset.name for preset in PRESETS)]
    assert str(presets_file) in caplog.text
    assert FewStepSchedule.validate_inputs(preset=AUTO) is True
    assert FewStepSchedule.validate_inputs(preset=None) is True  # linked
    assert FewStepSchedule.validate_inputs(preset="flux.1-schnell") is True
    assert str(presets_file) in FewStepSchedule.validate_inputs(preset="my-turbo")
    assert len(schedule("flux.1-schnell")) == 5


def test_unknown_names_are_answered_with_those_known():
    assert "Known: sd3.5-flash" in FewStepSchedule.validate_inputs(preset="gone")
