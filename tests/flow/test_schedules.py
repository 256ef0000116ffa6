import math

import pytest
import torch
from fewstep.flow import schedules
from hypothesis import given
from hypothesis import strategies as st

shifts = st.floats(0.1, 20)
steps = st.integers(1, 50)


@given(steps, shifts)
def test_formulas_fall_from_one_to_zero(n, shift):
    for formula in schedules.FORMULAS:
        sigmas = schedules.compute(formula, n, shift)
        assert sigmas.dtype == torch.float32 and len(sigmas) == n + 1
        assert sigmas[0] == 1
        assert torch.equal(schedules.check_sigmas(sigmas), sigmas)


@given(st.floats(0, 1), shifts)
def test_unshift_undoes_shift(u, shift):
    assert schedules.unshift_time(schedules.shift_time(u, shift), shift) == pytest.approx(u)


@given(st.floats(0.001, 1), st.floats(-3, 3))
def test_mu_is_the_logarithm_of_shift(u, mu):
    bfl = math.exp(mu) / (math.exp(mu) + (1 / u - 1))
    assert schedules.shift_time(u, schedules.shift_from_mu(mu)) == pytest.approx(bfl)


def test_flux2_mu_meets_at_the_ends_of_its_line():
    # 200 steps: mu_200; 10 steps: mu_10 (values of BFL's formula at 4096 tokens)
    assert schedules.flux2_mu(4096, 200) == pytest.approx(1.6927e-4 * 4096 + 0.45666666)
    assert schedules.flux2_mu(4096, 10) == pytest.approx(8.73809524e-5 * 4096 + 1.89833333)
    assert schedules.flux2_mu(4301, 4) == schedules.flux2_mu(4301, 200)


@given(steps, steps, shifts)
def test_resampled_uniform_is_uniform(n, m, shift):
    stretched = schedules.resample(schedules.uniform(m, shift), n, shift)
    # float32 knots, divided by the slope of the shift (up to 20) at the ends
    torch.testing.assert_close(stretched, schedules.uniform(n, shift), atol=1e-5, rtol=0)


@given(steps, shifts, shifts)
def test_another_shift_is_the_formula_at_that_shift(n, shift, other):
    reshifted = schedules.resample(schedules.uniform(n, shift), n, shift, new_shift=other)
    torch.testing.assert_close(reshifted, schedules.uniform(n, other), atol=1e-4, rtol=0)


@given(st.integers(1, 12), st.integers(1, 6), shifts)
def test_denoise_keeps_the_last_of_a_longer_schedule(n, factor, shift):
    """ComfyUI's BasicScheduler: int(steps / denoise) steps, the last steps+1 sigmas."""
    part = schedules.resample(schedules.uniform(n, shift), n, shift, denoise=1 / factor)
    whole = schedules.uniform(n * factor, shift)
    torch.testing.assert_close(part, whole[-(n + 1) :], atol=1e-5, rtol=0)


def test_denoise_of_an_explicit_row_lies_on_its_lines():
    row = torch.tensor([1, 0.8, 0.4, 0.2, 0])
    half = schedules.resample(row, 4, denoise=0.5)
    torch.testing.assert_close(half, torch.tensor([0.4, 0.3, 0.2, 0.1, 0]))
    assert schedules.resample(row, 2).tolist() == row[::2].tolist()


@given(
    st.lists(st.integers(1, 999), min_size=1, max_size=8, unique=True), steps, shifts,
    st.floats(0.01, 1),
)  # fmt: skip
def test_resampled_rows_are_valid_schedules(levels, n, shift, denoise):
    row = torch.tensor([*sorted(levels, reverse=True), 0]) / 1000
    sigmas = schedules.resample(row, n, shift, denoise=denoise)
    assert len(schedules.check_sigmas(sigmas)) == n + 1


def test_nothing_to_change_returns_the_row_itself():
    row = schedules.check_sigmas([1, 0.8959, 0.7371, 0.6022, 0])
    assert schedules.resample(row, 4, 3.0) is row


def test_denoise_zero_is_no_step_and_others_are_refused():
    assert schedules.resample(schedules.uniform(4), 4, denoise=0).shape == (0,)
    for denoise in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="denoise"):
            schedules.resample(schedules.uniform(4), 4, denoise=denoise)


@pytest.mark.parametrize(
    "sigmas, said",
    [
        ([1, 0.5, 0.75, 0], "0.75 at place 2 .* Order"),
        ([1, 0.5, 0.5, 0], "0.5 at place 2 .* Order"),
        ([1, 0.5, 0.1], "end in 0.1. Add a 0"),
        ([1, float("nan"), 0], "nan at place 1"),
        ([1000, 500, 0], "1000 at place 0 .* Divide by 1000"),
        ([1, -0.5, 0], "-0.5 at place 1"),
        ([float("inf"), 0], "inf at place 0"),
        ([0], "at least two"),
        ([], "at least two"),
        ([[1, 0]], "at least two"),
    ],
)
def test_bad_sigmas_name_value_and_remedy(sigmas, said):
    with pytest.raises(ValueError, match=said):
        schedules.check_sigmas(sigmas)


@pytest.mark.parametrize("text", ["1, .9, .75, .5, 0", "1 0.9 0.75 0.5 0", "1;.9;\n.75 ,5e-1, 0,"])
def test_typed_sigmas(text):
    expected = torch.tensor([1, 0.9, 0.75, 0.5, 0])
    assert torch.equal(schedules.parse_sigmas(text), expected)


def test_typed_words_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'half' .* not a number"):
        schedules.parse_sigmas("1, half, 0")


def test_unknown_formula_lists_those_known():
    with pytest.raises(ValueError, match=r"karras.*uniform, sgm_uniform, diffusers"):
        schedules.compute("karras", 4, 3)
