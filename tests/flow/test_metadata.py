import numpy as np
import pytest
import torch
from fewstep.flow import PRESETS, Preset, preset_from_metadata, preset_to_metadata

GIVEN = {
    "fewstep.version": 1,
    "fewstep.name": "mine",
    "fewstep.rule": "euler",
    "fewstep.steps": 4,
    "fewstep.shift": 3.0,
    "fewstep.cfg": 1.2,
    "fewstep.t5": "zeros256",
    "fewstep.sigmas.2": [1.0, 0.75, 0.0],
    "fewstep.sigmas.4": np.float32([1, 0.9, 0.75, 0.5, 0]).tolist(),
    "general.architecture": "sd3",
}


def as_file(metadata):
    """What comes back from a GGUF file, which holds floats as float32."""

    def stored(value):
        if isinstance(value, list):
            return [stored(item) for item in value]
        return float(np.float32(value)) if isinstance(value, float) else value

    return {key: stored(value) for key, value in metadata.items()}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_round_trip(preset):
    back = preset_from_metadata(as_file(preset_to_metadata(preset)))
    assert preset_to_metadata(back) == preset_to_metadata(preset)
    for steps in (1, 2, 4, 5, 6, 8):
        there = preset.sigmas(steps, tokens=4096)
        torch.testing.assert_close(back.sigmas(steps, tokens=4096), there, atol=0, rtol=0)


def test_a_preset_of_rows_comes_back_equal():
    preset = Preset("mine", "Mine", 2, rows=((1, 0.7, 0), (1, 0.6, 0.3, 0)), cfg=1.1, shift=3.3)
    assert preset_from_metadata(as_file(preset_to_metadata(preset))) == preset


def test_the_default_row_of_a_formula_is_written_out_but_not_flux2s():
    rows = {
        preset.name: [key for key in preset_to_metadata(preset) if ".sigmas." in key]
        for preset in PRESETS
    }
    assert rows["flux.1-schnell"] == ["fewstep.sigmas.4"]
    assert rows["flux.2-klein-4b"] == []


def test_reading_a_checkpoints_keys():
    preset = preset_from_metadata(GIVEN)
    assert preset.sigmas().tolist() == torch.tensor([1, 0.9, 0.75, 0.5, 0]).tolist()
    assert (preset.name, preset.label, preset.rule, preset.t5) == (
        "mine",
        "mine",
        *("euler", "zeros256"),
    )
    assert preset.shift == 3 and preset.cfg == pytest.approx(1.2)


def test_a_file_without_our_keys_has_no_preset():
    assert preset_from_metadata({"general.architecture": "sd3"}) is None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"fewstep.version": 2}, r"fewstep\.version is 2; this FewStep reads 1"),
        ({"fewstep.name": None}, r"fewstep\.name is missing"),
        ({"fewstep.rule": None}, r"fewstep\.rule is missing"),
        ({"fewstep.rule": "heun"}, "heun"),
        ({"fewstep.cfg": "one"}, r"fewstep\.cfg is 'one': expected float"),
        ({"fewstep.cfg": True}, r"fewstep\.cfg is True"),
        ({"fewstep.steps": 4.5}, r"fewstep\.steps is 4\.5: expected int"),
        ({"fewstep.sigmas.3": [1.0, 0.75, 0.0]}, r"fewstep\.sigmas\.3 is .* expected n\+1 numbers"),
        ({"fewstep.sigmas.x": [1.0, 0.0]}, r"fewstep\.sigmas\.x"),
        ({"fewstep.sigmas.1": "10"}, r"fewstep\.sigmas\.1"),
        ({"fewstep.sigmas.1": ["a", "b"]}, r"fewstep\.sigmas\.1"),
        ({"fewstep.sigmas.1": 1.0}, r"fewstep\.sigmas\.1"),
        ({"fewstep.sigmas.2": [0.0, 0.75, 1.0]}, "Order the sigmas"),
        ({"fewstep.shift": 1e300}, "shift is inf"),
    ],
)
def test_malformed_keys_are_named(change, said):
    metadata = {key: value for key, value in (GIVEN | change).items() if value is not None}
    with pytest.raises(ValueError, match=said):
        preset_from_metadata(metadata)
