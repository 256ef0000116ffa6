"""The teacher's trainer on ComfyUI's own modules, at toy size."""

from functools import partial

import comfy.sd
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from fewstep.demo import evaluate, export, recipe
from fewstep.demo.latents import fit_latent_code
from fewstep.demo.prompts import tokenize
from fewstep.demo.vae import DECODER_GAIN
from fewstep.distill.guidance import GuidanceTask
from fewstep.distill.loop import Budget, load_checkpoint, train
from fewstep.distill.model import END, START, FlowModel, empty_prompt
from fewstep.distill.optimize import autocast
from fewstep.distill.reflow import ReflowTask
from fewstep.distill.teacher import TeacherConfig, TeacherTask
from fewstep.flow import sample_euler, uniform
from fewstep.host import loading, modules

TOY = TeacherConfig(depth=1, text_width=32, text_heads=2, batch=4, warmup=2, full_every=3)
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def code():
    return fit_latent_code(scenes=128)


def task(code, config=TOY):
    data = partial(recipe.training_batch, code, config.batch)
    return TeacherTask(config, recipe.vocabulary(), data)


def reflow(code, batches=2):
    data = partial(recipe.reflow_batch, code, TOY.batch, 0)
    sigmas = uniform(2, 2.0)
    return ReflowTask(TOY, random_model(), recipe.LATENT, sigmas, data, batches)


def random_model(seed=0):
    """A toy whose zero-initialised layers are filled, so that everything matters."""
    torch.manual_seed(seed)
    model = FlowModel(TOY, recipe.vocabulary()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not parameter.any() and "embedder" not in name:
            parameter.normal_(std=0.05)
    model.text.table[1:].normal_()
    return model


def test_loss_falls(code):
    training = task(code)
    losses = [training.step(i, 0.0).item() for i in range(40)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("make", [task, reflow])
def test_goes_on_to_the_very_same_weights(code, tmp_path, make):
    budget = Budget(samples=6 * TOY.batch)
    whole = make(code)
    train(whole, tmp_path / "whole.pt", budget)
    cut = make(code)
    for i in range(3):
        cut.step(i, i / 6)
    done = {"steps": 3, "samples": 3 * TOY.batch, "seconds": 1.0}
    torch.save({"task": cut.state_dict(), "done": done}, tmp_path / "cut.pt")
    again = make(code)
    again.model.mmdit.final_layer.linear.weight.data.normal_()  # a process that knows nothing
    train(again, tmp_path / "cut.pt", budget)
    for name, value in whole.state_dict()["model"].items():
        assert torch.equal(value, again.state_dict()["model"][name]), name
    for name, value in whole.ema.items():
        assert torch.equal(value, again.ema[name]), name


def test_average_follows_the_weights(code):
    training = task(code)
    start = {name: value.clone() for name, value in training.ema.items()}
    for i in range(4):
        training.step(i, 0.0)
    name = "mmdit.joint_blocks.0.x_block.attn.qkv.weight"
    weight = training.model.state_dict()[name]
    assert not torch.equal(training.ema[name], start[name])
    assert (training.ema[name] - weight).norm() < (start[name] - weight).norm()


def test_unknown_words_stay_zero(code):
    training = task(code)
    for i in range(3):
        training.step(i, 0.0)
    assert training.model.text.table[0].abs().max() == 0
    assert training.model.text.table[1:].abs().min() > 0


def test_every_word_of_the_grammar_is_in_the_token_table(code):
    model = FlowModel(TOY, recipe.vocabulary())
    _, tokens = recipe.training_batch(code, 64, 0)
    assert (model.text.rows[tokens] > 0).all()
    assert (tokens[..., 0] == START).all() and (tokens[..., -1] == END).all()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_hosts(masked):
    q, k, v = torch.randn(3, 2, 7, 32)
    mask = torch.full((7, 7), float("-inf")).triu_(1) if masked else None
    mine = modules.attention(q, k, v, 4, mask=mask)
    assert torch.allclose(mine, attention_pytorch(q, k, v, 4, mask=mask), atol=1e-5)


def test_velocity_equals_the_hosts_on_padded_conditioning():
    model = random_model()
    x, context, pooled = torch.randn(2, 16, 16, 16), torch.randn(2, 77, 32), torch.randn(2, 32)
    sigma = torch.tensor([0.3, 1.0])
    mine = modules.velocity(model.mmdit, x, sigma, context, pooled)
    wide = torch.nn.functional.pad(context, (0, 4096 - 32))
    theirs = model.mmdit(x, 1000 * sigma, wide, torch.nn.functional.pad(pooled, (0, 1280)))
    assert mine.std() > 0.1
    assert torch.allclose(mine, theirs, atol=1e-4)


def test_short_context_is_the_beginning_of_the_long_one():
    model = random_model()
    tokens = tokenize([PROMPT])
    whole, pooled = model.encode(tokens)
    short, same = model.encode(tokens[..., :16])
    assert torch.allclose(whole[:, :16], short, atol=1e-5)
    assert torch.allclose(pooled, same, atol=1e-5)


def test_exported_files_condition_and_predict_as_the_trained_model(tmp_path):
    model = random_model()
    vae = modules.build_taesd(DECODER_GAIN).requires_grad_(False)
    mmdit, text, vae_path = map(str, export.export(model, vae, TOY, tmp_path))
    clip = loading.load_text_encoders([text])
    assert clip.tokenize(PROMPT)["l"][0][1][0] == modules.tokenize(PROMPT)[1]
    context, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
    mine, mine_pooled = model.encode(tokenize([PROMPT]))
    # 8-bit token table and 16-bit weights: half a percent or so of the values' spread.
    assert torch.allclose(context[..., :32], mine, atol=0.05)
    assert torch.allclose(pooled[:, :32], mine_pooled, atol=0.05)
    assert context.shape[1:] == (77, 4096) and not context[..., 32:].any()
    host = loading.load_diffusion_model(mmdit)
    assert type(host.model).__name__ == "SD3"
    x, sigma = torch.randn(1, 16, 16, 16), torch.tensor([0.7])
    seen = host.model.diffusion_model(x, 1000 * sigma, context, pooled)
    known = modules.velocity(model.mmdit, x, sigma, mine, mine_pooled)
    assert (seen - known).norm() < 0.05 * known.norm()
    assert isinstance(loading.load_vae(vae_path), comfy.sd.VAE)
    assert host.get_attachment(loading.PRESET) == export.PRESET


def test_host_decodes_model_space_latents(tmp_path):
    vae = modules.build_taesd(DECODER_GAIN).requires_grad_(False)
    latents = torch.randn(1, 16, 8, 8)
    host_space = latents / modules.VAE_SCALE + modules.VAE_SHIFT  # what KSampler hands on
    pixels = vae.decode(host_space) / 2 + 0.5
    assert torch.allclose(pixels, vae.taesd_decoder(latents * DECODER_GAIN), atol=1e-4)


def guidance(code, scale):
    data = partial(recipe.training_batch, code, TOY.batch)
    return GuidanceTask(TOY, random_model(), scale, data)


def test_guided_student_starts_as_its_teacher_and_learns_what_guidance_adds(code):
    assert guidance(code, scale=1.0).step(0, 0.0) == 0  # nothing to learn at scale 1
    training = guidance(code, scale=3.0)
    losses = [training.step(i, 0.0).item() for i in range(40)]
    assert losses[0] > 0 and sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_guided_target_is_that_of_classifier_free_guidance(code):
    training = guidance(code, scale=3.0)
    x, sigma = torch.randn(2, 16, 16, 16), torch.tensor([0.5, 0.9])
    _, tokens = training.data(0)
    prompt, known = tokens[:2], torch.ones_like(tokens[:2], dtype=torch.bool)
    target = training._target(x, x, sigma, prompt, known)
    told = training.teacher(x, sigma, prompt)
    untold = training.teacher(x, sigma, empty_prompt(prompt))
    assert torch.allclose(target, 3 * told - 2 * untold, atol=1e-5)
    assert torch.equal(empty_prompt(prompt)[:1], tokenize([""]))


def test_guided_stage_names_the_teacher_that_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="teacher first"):
        recipe.stage_task("guided", tmp_path, config=TOY)


def test_reflow_learns_the_straight_way_from_noise_to_the_mended_picture(code):
    training = reflow(code)
    losses = [training.step(i, 0.0).item() for i in range(40)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert set(training.pairs) == {0, 1}


def test_reflow_pairs_each_noise_with_what_the_teacher_makes_of_it(code):
    training = reflow(code)
    tokens, mend = training.data(1)
    noise = training._noise(1, (TOY.batch, *recipe.LATENT))

    def denoise(x, sigma):
        return x - sigma[:, None, None, None] * training.teacher(x, sigma, tokens).float()

    tokens = tokens[..., : TOY.short_context]
    with autocast(torch.device("cpu")):
        made = sample_euler(denoise, noise, uniform(2, 2.0))
    latents, _, same, sigma = training._batch(3, torch.Generator())  # of two: number 1 again
    assert torch.equal(same, noise) and torch.equal(latents, mend(made))
    assert ((sigma > 0) & (sigma <= 1)).all()


def test_reflow_stage_names_the_model_that_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="guided first"):
        recipe.stage_task("reflow", tmp_path, config=TOY)


def test_draws_by_euler_steps_with_and_without_guidance():
    model = random_model()
    decoder = modules.build_taesd(DECODER_GAIN).taesd_decoder.requires_grad_(False)
    plain, guided, again = (
        evaluate.draw_pictures(model, decoder, [PROMPT] * 2, uniform(2, 2.0), cfg, seed=5)
        for cfg in (1.0, 3.0, 1.0)
    )
    assert plain.shape == (2, 128, 128, 3) and (plain == again).all()
    assert (plain != guided).any()


def test_recipe_runs_every_stage_and_goes_on(tmp_path):
    for _ in range(2):
        recipe.train_stages(tmp_path, recipe.STAGES, samples=320, config=TOY)
    assert load_checkpoint(tmp_path / "teacher.pt")["done"]["samples"] == 320
    share = 320 * recipe.STAGES["decoder"][1]
    assert share <= load_checkpoint(tmp_path / "decoder.pt")["done"]["samples"] < share + 16
    model = recipe.load_flow_model(tmp_path / "reflow2.pt", TOY)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    recipe.load_vae(tmp_path)
