"""The built-in presets give the values printed in their sources, to four decimals."""

import pytest
import torch
from fewstep.flow import PRESETS, SURE, find_preset

EIGHT_AT_SHIFT_3 = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
FOUR_AT_SHIFT_3 = [1, 0.9, 0.75, 0.5, 0]
PRINTED = {
    "sd3.5-flash-experimental": (FOUR_AT_SHIFT_3, [1, 0.75, 0]),
    "sd3.5-large-turbo": ([1, 0.9004, 0.7511, 0.503, 0],),
    "sd3.5-large-turbo-ref": ([1, 0.8577, 0.6022, 0.0089, 0],),
    "sd3.5-medium-turbo": (EIGHT_AT_SHIFT_3,),
    "swd-sd3.5": (
        [1, 0.8959, 0.7371, 0.6022, 0],
        [1, 0.9454, 0.8959, 0.7904, 0.7371, 0.6022, 0],
    ),
    "senseflow-sd3.5": (FOUR_AT_SHIFT_3,),
    "senseflow-sd3.5-euler": (FOUR_AT_SHIFT_3,),
    "flux.1-schnell": ([1, 0.75, 0.5, 0.25, 0],),
    "flux.1-dev-8-step-lora": (
        [1, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109, 0],
    ),
    "qwen-image-lightning": (FOUR_AT_SHIFT_3, EIGHT_AT_SHIFT_3),
    "z-image-turbo": (EIGHT_AT_SHIFT_3,),
    "flux.2-klein-4b": ([1, 0.9674, 0.9081, 0.7672, 0],),
    "wan2.1-lightx2v": ([1, 0.9375, 0.8333, 0.625, 0],),
    "wan2.2-a14b-lightx2v": ([1, 0.9375, 0.8333, 0.625, 0],),
}  # fmt: skip
ROWS = [(name, row) for name, rows in PRINTED.items() for row in rows]


def test_every_preset_has_printed_values():
    assert [preset.name for preset in PRESETS] == list(PRINTED)


@pytest.mark.parametrize("name, printed", ROWS)
def test_sigmas_are_those_printed(name, printed):
    sigmas = find_preset(name).sigmas(len(printed) - 1, tokens=4096)  # 1024² in tokens of 16²
    # half a unit of the fourth decimal, and float32's rounding
    torch.testing.assert_close(sigmas, torch.tensor(printed).float(), atol=0.50001e-4, rtol=0)


def test_first_printed_row_is_the_default():
    for name, rows in PRINTED.items():
        assert find_preset(name).steps == len(rows[0]) - 1


def test_rules_and_extras():
    renoise = {preset.name for preset in PRESETS if preset.rule == "renoise"}
    assert renoise == {"swd-sd3.5", "senseflow-sd3.5"}
    assert all(preset.cfg == 1 for preset in PRESETS)
    swd = find_preset("swd-sd3.5")
    assert swd.latent_sides == ((64, 80, 96, 128), (32, 48, 64, 80, 96, 128))
    assert all(len(sides) + 1 == len(row) for sides, row in zip(swd.latent_sides, swd.rows))  # noqa: B905


def test_wan22_switches_experts_after_two_of_four_steps():
    wan = find_preset("wan2.2-a14b-lightx2v")
    assert [bool(sigma >= wan.expert_boundary) for sigma in wan.sigmas()[:-1]] == [
        *(True, True, False, False)
    ]


def test_each_row_says_where_it_comes_from():
    for preset in PRESETS:
        assert preset.source and preset.sure in SURE
        assert ("experimental" in preset.name) == (preset.sure == "G")
        assert ("experimental" in preset.label) == (preset.sure == "G")


def test_unknown_preset_lists_those_known():
    with pytest.raises(ValueError, match=r"'turbo'.*sd3\.5-large-turbo, sd3\.5-large-turbo-ref"):
        find_preset("turbo")
