import json

import pytest
from fewstep.flow import PRESETS, find_preset, load_user_presets

ROW = {"label": "My turbo", "sigmas": [[1, 0.9, 0.75, 0.5, 0], [1, 0.75, 0]], "shift": 3}


def write(tmp_path, content):
    path = tmp_path / "presets.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def test_a_users_row_is_a_preset_like_any_other(tmp_path):
    path = write(tmp_path, {"mine": ROW | {"rule": "renoise", "t5": "omit", "cfg": 1.5}})
    presets = load_user_presets(path)
    mine = find_preset("mine", (*PRESETS, *presets))
    assert (mine.label, mine.steps, mine.rule, mine.t5, mine.cfg) == (
        *("My turbo", 4, "renoise", "omit", 1.5),
    )
    assert mine.sigmas(2).tolist() == [1, 0.75, 0]


def test_only_sigmas_are_required(tmp_path):
    (mine,) = load_user_presets(write(tmp_path, {"mine": {"sigmas": [[1, 0.5, 0]]}}))
    assert (mine.label, mine.steps, mine.rule, mine.cfg) == ("mine", 2, "euler", 1.0)


def test_a_formula_with_its_shift_will_do(tmp_path):
    (mine,) = load_user_presets(write(tmp_path, {"mine": {"formula": "uniform", "shift": 2}}))
    assert len(mine.sigmas(6)) == 7


def test_no_file_no_presets(tmp_path):
    assert load_user_presets(tmp_path / "presets.json") == ()


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "Correct the JSON"),
        (b"\xff".decode("latin1") + "{", "Correct the JSON"),
        ("[]", "expected .* found list"),
        ('{"a": {}, "a": {}}', "'a' appears twice"),
        ({"a": 3}, "preset 'a': expected an object of fields, found 3"),
        ({"a": {}}, "preset 'a': there are neither sigmas nor a formula"),
        ({"flux.1-schnell": ROW}, "built-in preset has this name: choose another"),
        ({"a": ROW | {"stepz": 4}}, "preset 'a': Unknown field 'stepz'. Known: .*steps"),
        ({"a": ROW | {"steps": "4"}}, "preset 'a': steps is '4': write a value of type int"),
        ({"a": ROW | {"cfg": True}}, "preset 'a': cfg is True"),
        ({"a": ROW | {"sigmas": [1, 0.5, 0]}}, "preset 'a': sigmas is .*list of rows"),
        ({"a": ROW | {"sigmas": [["1", 0]]}}, "preset 'a': sigmas is"),
        ({"a": ROW | {"sigmas": [[1, 0.5]]}}, "preset 'a': .*Add a 0"),
        ({"a": ROW | {"rule": "heun"}}, "preset 'a': Unknown rule 'heun'. Known: euler, renoise"),
    ],
)
def test_errors_name_file_row_field_and_remedy(tmp_path, content, said):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=said) as caught:
        load_user_presets(path, taken={preset.name for preset in PRESETS})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"a": {"sigmas": [[1' + "0" * 400 + ", 0]]}}", "preset 'a'"),
        ("[" * 100_000, "Correct the JSON"),
        ('{"a": {"formula": "uniform", "shift": 1, "steps": 1000000000000}}', "between 1 and 1000"),
        ('{"a": {"sigmas": [[1, 0.5, 0]], "latent_sides": [[64, 32]]}}', "a latent only grows"),
        ('{"a": {"sigmas": [[1, 0.5, 0]], "latent_sides": [[]]}}', "a latent only grows"),
    ],
)
def test_wild_numbers_are_refused_as_any_other_fault(tmp_path, content, said):
    path = tmp_path / "presets.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        load_user_presets(path)


def test_a_folder_in_the_files_place_is_named(tmp_path):
    (tmp_path / "presets.json").mkdir()
    with pytest.raises(ValueError, match=r"presets\.json cannot be read"):
        load_user_presets(tmp_path / "presets.json")


def test_windows_editors_mark_is_skipped(tmp_path):
    path = tmp_path / "presets.json"
    path.write_text('{"a": {"sigmas": [[1, 0.5, 0]]}}', encoding="utf-8-sig")
    assert load_user_presets(path)[0].name == "a"
