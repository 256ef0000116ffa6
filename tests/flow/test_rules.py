"""Oracles: a model that knows the one picture x0 must land on it, whatever the schedule."""

from itertools import pairwise

import pytest
import torch
from fewstep.flow import PRESETS, RULES, sample_euler, sample_renoise, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPE = (2, 4, 8, 8)
X0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def point_mass(x, sigma, **extra_args):
    """All data is X0: the ideal denoised picture is X0 at every sigma."""
    assert sigma.shape == (x.shape[0],)
    return X0


def run(rule, sigmas, start=None, **options):
    """Sample from `start`; return the result and what the callback saw."""
    seen = []
    start = NOISE if start is None else start
    x = RULES[rule](point_mass, start, sigmas, {"seed": 5}, callback=seen.append, **options)
    return x, seen


@settings(deadline=None)
@given(
    st.sampled_from(PRESETS), st.sampled_from(list(RULES)), st.integers(1, 12),
    st.floats(0.05, 1),
)  # fmt: skip
def test_point_mass_lands_on_x0(preset, rule, steps, denoise):
    sigmas = preset.sigmas(steps, tokens=4096, denoise=denoise).double()
    start = sigmas[0] * NOISE + (1 - sigmas[0]) * X0
    x, seen = run(rule, sigmas, start)
    # euler takes x - (x - x0)/sigma·sigma: two roundings of float64 a step
    torch.testing.assert_close(x, X0, atol=1e-13, rtol=0)
    if rule == "renoise":
        assert torch.equal(x, X0)
    assert [step["i"] for step in seen] == list(range(steps))


def test_euler_stays_on_the_straight_line():
    sigmas = uniform(5, 3.0).double()
    _, seen = run("euler", sigmas)
    for step in seen:
        on_line = step["sigma"] * NOISE + (1 - step["sigma"]) * X0
        torch.testing.assert_close(step["x"], on_line, atol=1e-13, rtol=0)


def test_renoise_takes_fresh_noise_of_the_seed_each_step():
    sigmas = uniform(4, 3.0).double()
    _, seen = run("renoise", sigmas)
    noises = [(step["x"] - (1 - step["sigma"]) * X0) / step["sigma"] for step in seen]
    torch.testing.assert_close(noises[0], NOISE)
    drawn = torch.Generator().manual_seed(6)  # seed + 1 on the CPU, as k-diffusion in ComfyUI
    for noise in noises[1:]:
        fresh = torch.randn(SHAPE, generator=drawn, dtype=torch.float64)
        torch.testing.assert_close(noise, fresh, atol=1e-12, rtol=0)


def test_the_seed_decides_and_torchs_own_generator_is_left_alone():
    def blind(x, sigma, seed):
        return 0.5 * x  # so that the noise matters to the end

    def sample(seed):
        return sample_renoise(blind, NOISE, uniform(3).double(), {"seed": seed})

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))
    assert sample(2**64 - 1).isfinite().all()  # ComfyUI's highest seed
    assert torch.equal(torch.get_rng_state(), before)


def test_a_noise_sampler_of_the_callers_own_is_used():
    calls = []

    def silence(sigma, sigma_next):
        calls.append((sigma.item(), sigma_next.item()))
        return torch.zeros(SHAPE, dtype=torch.float64)

    sample_renoise(point_mass, NOISE, uniform(3).double(), noise_sampler=silence)
    expected = uniform(3).double().tolist()
    assert calls == list(pairwise(expected))[:-1]


def test_extra_args_reach_the_model():
    got = []
    for sample in RULES.values():
        sample(lambda x, sigma, **extra: got.append(extra) or x, NOISE, uniform(1), {"seed": 1})
    assert got == [{"seed": 1}] * 2


def test_euler_splits_anywhere():
    """A schedule cut in two (ComfyUI's SplitSigmas) gives the same picture."""
    sigmas = uniform(4, 3.0).double()

    def model(x, sigma):
        return torch.tanh(x) * (1 - sigma.view(-1, 1, 1, 1))

    whole = sample_euler(model, NOISE, sigmas)
    half = sample_euler(model, sample_euler(model, NOISE, sigmas[:3]), sigmas[2:])
    assert torch.equal(whole, half)


SIDES = ((4, 6, 8), (2, 4, 6, 8))


def sizes_seen(sigmas, x=NOISE, sides=SIDES, **extra):
    seen = []

    def constant(x, sigma, **extra):
        seen.append(tuple(x.shape[-2:]))
        return torch.full_like(x, 0.25)

    out = sample_renoise(constant, x, sigmas, {"seed": 1, **extra}, sides=sides)
    assert out.shape == x.shape
    # bicubic keeps a constant, to the rounding of its four weights
    torch.testing.assert_close(out, torch.full_like(x, 0.25), atol=1e-6, rtol=0)
    return seen


def test_the_latent_grows_between_steps():
    assert sizes_seen(uniform(3)) == [(4, 4), (6, 6), (8, 8)]
    assert sizes_seen(uniform(4)) == [(2, 2), (4, 4), (6, 6), (8, 8)]


def test_sides_scale_to_any_shape_and_to_video():
    assert sizes_seen(uniform(3), torch.randn(1, 4, 16, 24)) == [(8, 12), (12, 18), (16, 24)]
    assert sizes_seen(uniform(3), torch.randn(1, 4, 3, 8, 8)) == [(4, 4), (6, 6), (8, 8)]


def test_unknown_steps_and_a_later_start_run_at_full_size():
    assert sizes_seen(uniform(2)) == [(8, 8)] * 2
    assert sizes_seen(uniform(4)[1:]) == [(8, 8)] * 3
    assert sizes_seen(uniform(3), sides=()) == [(8, 8)] * 3


def test_small_steps_keep_unit_noise_and_enlarge_the_picture():
    sigmas, picture = uniform(3, 3.0), torch.linspace(0, 1, 16).repeat(1, 1, 16, 1)
    seen = []

    def model(x, sigma, seed):
        seen.append(x)
        return torch.nn.functional.interpolate(picture, x.shape[-2:], mode="bicubic")

    start = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    x = sample_renoise(model, start, sigmas, {"seed": 1}, sides=((8, 12, 16),))
    assert torch.equal(seen[0], start[..., :8, :8])
    residue = seen[2] - (1 - sigmas[2]) * picture
    assert residue.std() == pytest.approx(sigmas[2].item(), rel=0.15)  # 256 samples
    torch.testing.assert_close(x, picture)


def test_a_mask_does_not_fit_a_growing_latent():
    with pytest.raises(ValueError, match="Remove the mask"):
        sizes_seen(uniform(3), denoise_mask=torch.ones(SHAPE))
