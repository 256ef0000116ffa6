"""A budget is kept, spent where it saves the most error, and refused where nothing fits."""

import itertools
import time

import pytest
import torch
from fewstep.quant import GGUFError
from fewstep.quant.budget import LADDER, fit, hull, parse_budget, spend
from fewstep.quant.convert import Options, convert
from fewstep.quant.plan import make_plan
from fewstep.quant.recipes import recipe_of_type
from fewstep.quant.sources import open_source
from fewstep.tests.quant import models
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Of an SD3 whose x_block has weights ten times as large as its context_block."""
    tensors = models.sd3(depth=1)
    for name in tensors:
        if ".x_block." in name:
            tensors[name] = tensors[name] * 10
    path = tmp_path_factory.mktemp("models") / "m.safetensors"
    save_file(tensors, path)
    return make_plan(open_source(path), recipe_of_type(T.Q8_0))


@pytest.mark.parametrize("bits", [3.5, 4.5, 6, 9, 30])
def test_budget_is_kept_and_spent(plan, bits, tmp_path):
    room = parse_budget(f"{bits + 2}bpw")(plan)  # 2 for what is kept
    made = fit(plan, room)
    assert made.nbytes <= room
    types = {choice.name: choice.qtype for choice in made.choices if choice.free}
    assert set(types.values()) <= {*LADDER, T.BF16}
    for name, qtype in types.items():
        twin = types[name.replace("context_block", "x_block")]
        size = {q: i for i, q in enumerate((*LADDER, T.BF16))}
        assert size[twin] >= size[qtype]
    if bits == 30:
        assert set(types.values()) == {T.BF16}
    report = convert(made, tmp_path / "a.gguf")
    assert report.size <= room + 2**14  # the header


def test_time_spent_measuring_is_told(plan, tmp_path):
    options = Options(measure=False)
    made = fit(plan, parse_budget("6bpw")(plan))
    since = time.monotonic() - options.started
    assert convert(made, tmp_path / "a.gguf", options=options).seconds >= since > 0


def test_more_room_means_less_error(plan, tmp_path):
    errors = []
    for bits in (5, 6, 7, 8):
        made = fit(plan, parse_budget(f"{bits}bpw")(plan))
        errors.append(convert(made, tmp_path / "a.gguf").total.squared_error)
    assert errors == sorted(errors, reverse=True) and errors[0] > 4 * errors[-1]


def test_importance_moves_bits(plan):
    name = "joint_blocks.0.context_block.mlp.fc1.weight"
    room = parse_budget("6bpw")(plan)
    before = next(c for c in fit(plan, room).choices if c.name == name)
    after = next(c for c in fit(plan, room, {name: torch.full((256,), 1e6)}).choices
                 if c.name == name)  # fmt: skip
    assert after.bits > before.bits


def test_too_small_a_budget_is_refused_before_anything_is_measured(plan):
    measured = []
    with pytest.raises(GGUFError, match=r"a budget of 1 kB is too small: the smallest types take"):
        fit(plan, 1000, progress=lambda *seen: measured.append(seen))
    assert not measured


def test_budgets_are_read(plan):
    weights = sum(choice.source.numel for choice in plan.choices)
    sizes = {"1.8GB": 1.8e9, "900 MiB": 900 * 2**20, "4bpw": weights / 2, "7 B": 7}
    for text, size in sizes.items():
        assert parse_budget(text)(plan) == int(size)
    for text in ("", "GB", "1.8", "1.8XB", "-1GB", "0GB"):
        with pytest.raises(GGUFError, match="is no budget"):
            parse_budget(text)


def test_steps_along_hulls_come_within_one_of_the_best_choice():
    g = torch.Generator().manual_seed(0)
    all_points, hulls = [], {}
    for name in "abc":
        sizes = torch.randint(1, 50, (5,), generator=g).cumsum(0).tolist()
        errors = (torch.rand(5, generator=g) * 100).tolist()
        all_points.append(list(zip(sizes, errors, LADDER[:5], strict=True)))
        hulls[name] = hull(all_points[-1])
    least = sum(points[0][0] for points in hulls.values())
    steps = [a[1] - b[1] for points in hulls.values() for a, b in itertools.pairwise(points)]
    exact = 0
    for spare in range(0, 400, 7):
        picked = [hulls[name][at] for name, at in spend(hulls, spare).items()]
        assert sum(point[0] for point in picked) <= least + spare
        error = sum(point[1] for point in picked)
        choices = itertools.product(*all_points)
        sums = [(sum(p[0] for p in choice), sum(p[1] for p in choice)) for choice in choices]
        best = min(e for size, e in sums if size <= least + spare)
        assert best - 1e-9 <= error <= best + max(steps)
        exact += error <= best + 1e-9
    assert exact > 20


def test_quantised_source_only_shrinks(plan, tmp_path):
    convert(plan, tmp_path / "q8.gguf", options=Options(measure=False))
    again = make_plan(open_source(tmp_path / "q8.gguf"), recipe_of_type(T.Q8_0))
    made = fit(again, 10**9)
    assert {c.qtype for c in made.choices if c.free} == {T.Q8_0}
    made = fit(again, int(again.nbytes * 0.8))
    assert made.nbytes <= again.nbytes * 0.8
