"""The files that ship, through the host's own loaders: right pictures of untrained sentences."""

import os

import numpy as np
import pytest
import torch
from fewstep.demo.captions import KINDS, draw_captions
from fewstep.demo.export import FILES
from fewstep.demo.miniature import Miniature
from fewstep.demo.scenes import draw as scene
from fewstep.demo.score import score
from fewstep.demo.shipped import MODELS
from fewstep.host import folders, loading, sampling, text

MEGABYTES = 25


@pytest.fixture(scope="module")
def model():
    return loading.load_diffusion_model(shipped("mmdit"))


@pytest.fixture(scope="module")
def clip():
    return loading.load_text_encoders([shipped("text")])


@pytest.fixture(scope="module")
def vae():
    return loading.load_vae(shipped("vae"))


def shipped(part):
    key, _, name = FILES[part].partition("/")
    assert name in folders.model_names(key)
    return folders.model_path(key, name)


@torch.inference_mode()
def draw(model, clip, vae, prompt, seed, steps=0):
    """-> (128, 128, 3) uint8, as the one-box node and VAE Decode do."""
    preset = sampling.choose_preset(sampling.AUTO, model)
    positive = text.encode(clip, prompt, preset=preset)
    negative = None if preset.cfg == 1 else text.encode(clip, "", preset=preset)
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    sampler = sampling.make_sampler(sampling.AUTO_RULE, preset)
    sigmas = sampling.schedule(preset, latent, steps)
    drawn = sampling.sample(model, positive, negative, latent, seed, preset.cfg, sampler, sigmas)
    return (vae.decode(drawn["samples"])[0].numpy() * 255).round().astype(np.uint8)


def test_files_are_small_and_complete(model, clip, vae):
    files = [path for path in MODELS.rglob("*.*") if path.is_file()]
    assert sum(os.path.getsize(path) for path in files) < MEGABYTES * 10**6
    assert {shipped(part) for part in FILES} <= set(map(str, files))
    assert type(model.model).__name__ == "SD3"
    preset = model.get_attachment(loading.PRESET)
    assert preset.cfg == 1 and preset.rule == "euler" and preset.steps <= 8
    assert vae.latent_channels == 16


def test_the_teacher_ships_beside_it():
    path = folders.model_path("diffusion_models", "fewstep-teacher.gguf")
    preset = loading.load_diffusion_model(path).get_attachment(loading.PRESET)
    assert (preset.steps, preset.cfg) == (50, 2)
    names = folders.model_names("diffusion_models")
    assert names.index("fewstep-demo.gguf") < names.index("fewstep-teacher.gguf")


@pytest.mark.parametrize(
    ("kind", "steps", "floor"), [("single", 4, 19), ("single", 2, 18), ("pair", 4, 17)]
)
def test_sentences_never_trained_are_drawn(model, clip, vae, kind, steps, floor):
    """Wholly right, of 20, without CFG: the README's figures less what chance takes off 20."""
    captions = draw_captions(np.random.default_rng(11), 20, (kind,), True)
    pictures = [draw(model, clip, vae, str(c), seed, steps) for seed, c in enumerate(captions)]
    verdicts = [score(*pair) for pair in zip(pictures, captions, strict=True)]
    assert sum(v.background for v in verdicts) >= 19
    assert sum(v.right for v in verdicts) >= floor


@pytest.mark.parametrize("encoder", ["text", "t5"])
def test_the_teacher_draws_by_either_encoder_alone(vae, encoder):
    """Wholly right, of 12 in 16 steps; SD3's T5 alone brings neither CLIP's tokens nor a pooled
    vector."""
    teacher = loading.load_diffusion_model(
        folders.model_path("diffusion_models", "fewstep-teacher.gguf")
    )
    clip = loading.load_text_encoders([shipped(encoder)], "sd3")
    captions = draw_captions(np.random.default_rng(14), 12, ("single", "pair"), True)
    pictures = [draw(teacher, clip, vae, str(c), seed, 16) for seed, c in enumerate(captions)]
    assert sum(score(*pair).right for pair in zip(pictures, captions, strict=True)) >= 10


@torch.inference_mode()
def test_models_are_trained_on_the_latents_that_the_vae_draws():
    miniature, rng = Miniature(), np.random.default_rng(13)
    pictures = scene(draw_captions(rng, 24, KINDS), rng)
    drawn = miniature.decode(miniature.code.encode(pictures)).clamp(0, 1)
    assert -10 * torch.log10((drawn - pictures).square().mean()) > 34


@torch.inference_mode()
def test_vae_gives_back_what_it_encodes(vae):
    captions = draw_captions(np.random.default_rng(12), 8, KINDS)
    pictures = scene(captions, np.random.default_rng(12)).movedim(1, -1)
    back = vae.decode(vae.encode(pictures))
    psnr = -10 * torch.log10((back - pictures).square().mean())
    assert psnr > 28
