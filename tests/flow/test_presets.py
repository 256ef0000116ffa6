import copy
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from fewstep.flow import PRESETS, Preset, check_sigmas, find_preset, uniform
from hypothesis import given
from hypothesis import strategies as st

MINE = Preset("mine", "Mine", 4, rows=((1, 0.9, 0.75, 0.5, 0), (1, 0.75, 0)), shift=3.0)


@given(
    st.sampled_from(PRESETS), st.integers(1, 30), st.none() | st.floats(0.1, 20),
    st.floats(0.01, 1),
)  # fmt: skip
def test_any_preset_gives_a_schedule_for_any_steps_shift_and_denoise(preset, n, shift, denoise):
    sigmas = preset.sigmas(n, tokens=1024, shift=shift, denoise=denoise)
    assert len(check_sigmas(sigmas)) == n + 1
    if denoise == 1:
        assert sigmas[0] == 1


def test_own_rows_come_out_untouched():
    for row in MINE.rows:
        assert MINE.sigmas(len(row) - 1).tolist() == list(row)


def test_rows_win_over_the_formula():
    preset = replace(MINE, formula="uniform", shift=5.0)
    assert preset.sigmas(4).tolist() == list(MINE.rows[0])
    assert torch.equal(preset.sigmas(5), uniform(5, 5.0))


def test_steps_without_a_row_are_stretched_and_logged(caplog):
    with caplog.at_level(logging.INFO):
        five = MINE.sigmas(5)
    assert caplog.messages == [
        "mine has no sigmas for 5 steps (it has them for 4, 2): those for 4 are stretched."
    ]
    torch.testing.assert_close(five, uniform(5, 3.0))  # the rows are uniform at shift 3


def test_known_steps_are_silent(caplog):
    with caplog.at_level(logging.INFO):
        MINE.sigmas(2)
        find_preset("flux.1-schnell").sigmas(7)
    assert not caplog.messages


def test_of_two_equally_near_rows_the_longer_is_stretched():
    bent = replace(MINE, rows=((1, 0.4, 0), (1, 0.9, 0.8, 0.7, 0)), shift=None)
    assert bent.sigmas(3)[1] > 0.8  # the line of the longer row, not 0.6 of the shorter


def test_shift_of_the_users_own_reshifts_rows_and_formulas():
    torch.testing.assert_close(MINE.sigmas(4, shift=5.0), uniform(4, 5.0))
    assert torch.equal(find_preset("flux.1-schnell").sigmas(4, shift=5.0), uniform(4, 5.0))


def test_flux2_needs_the_size_or_a_shift():
    klein = find_preset("flux.2-klein-4b")
    with pytest.raises(ValueError, match=r"depends on the picture's size: connect the latent"):
        klein.sigmas()
    assert torch.equal(klein.sigmas(shift=2.0), uniform(4, 2.0))
    assert klein.sigmas(tokens=256)[1] < klein.sigmas(tokens=4096)[1]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rows": ()}, "neither sigmas nor a formula"),
        ({"rows": ((1, 0.5, 0), (1, 0.4, 0))}, "two rows for one number of steps"),
        ({"rows": ((1, 0.5),)}, "Add a 0"),
        ({"formula": "karras"}, "karras.*uniform"),
        ({"formula": "uniform", "shift": None}, "needs a shift"),
        ({"rule": "heun"}, "heun.*euler, renoise"),
        ({"t5": "maybe"}, "maybe.*zeros256"),
        ({"sure": "very"}, "very.*H, M, L, G"),
        ({"steps": 0}, "steps is 0"),
        ({"shift": -1.0}, "shift is -1"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"cfg": 0.0}, "cfg is 0"),
        ({"expert_boundary": 875.0}, "expert_boundary is 875"),
        ({"latent_sides": ((64, 128.5),)}, "latent_sides"),
    ],
)
def test_bad_fields_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(MINE, **change)


def test_zero_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        MINE.sigmas(0)


def test_presets_are_values():
    assert pickle.loads(pickle.dumps(MINE)) == copy.deepcopy(MINE) == MINE
    assert hash(replace(MINE)) == hash(MINE)
