"""The page is made from the logs alone."""

import json

import pytest
from fewstep.distill.logs import CATEGORIES, rows
from fewstep.distill.table import page


def log(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluation(name, overall, **others):
    shares = dict.fromkeys([*CATEGORIES, "right"], 0.5)
    drawn = {"name": name, "steps": 4, "cfg": 1.0, "encoders": "no t5", "captions": 30}
    return {**drawn, **shares, "overall": overall, "frechet": 0.01, "seconds": 1.5, **others}


def test_the_last_measurement_of_a_thing_counts(tmp_path):
    lines = [evaluation("a", 0.1), evaluation("b", 0.2), evaluation("a", 0.3)]
    log(tmp_path / "evaluations.jsonl", lines)
    assert [row["overall"] for row in rows(tmp_path / "evaluations.jsonl")] == [0.3, 0.2]


def test_page_holds_every_run_ratio_and_noise(tmp_path):
    lines = [evaluation("match", 0.91), evaluation("split", 0.92, ratio=0.7)]
    log(tmp_path / "evaluations.jsonl", lines)
    measured = {"name": "match", "renoise": "shared", "sigma": 0.9, "scale": 412.2, "batches": 16}
    log(tmp_path / "noise.jsonl", [measured])
    losses = [{"step": 25 * i, "samples": 400 * i, "seconds": 120.0 * i} for i in (1, 2)]
    log(tmp_path / "match.jsonl", losses)
    text = page(tmp_path)
    half = " | ".join(["50.0"] * 6)
    assert f"| match | 4 | 1 | {half} | 91.0 | 50.0 | 0.0100 | 30 |" in text
    assert "| split | 0.7 | 92.0 | 50.0 | 0.0100 | 30 |" in text
    assert "| match | shared | 0.9 | 412 | 16 |" in text
    assert "| match | 50 | 800 | 4 |" in text and "| evaluations |" not in text


def test_runs_are_compared_by_encoders_and_by_bits(tmp_path):
    lines = [evaluation("split", 0.9), evaluation("split", 0.92, encoders="both")]
    lines += [evaluation("split", 0.9, recipe=name) for name in ("flash-16", "flash-6")]
    log(tmp_path / "evaluations.jsonl", [*lines, evaluation("match", 0.8)])
    text = page(tmp_path)
    assert "| split | 4 | no t5 | 90.0 |" in text and "| split | 4 | both | 92.0 |" in text
    assert "| split | 4 | flash-6 | 90.0 |" in text and "| match | 4 | no t5 |" not in text


def test_seeds_of_both_ways_of_renoising_are_averaged(tmp_path):
    same = {"stage": "match", "trained": 4800}
    lines = [
        evaluation(f"{how}-{seed}", overall + 0.02 * seed, renoise=how, seed=seed, **same)
        for how, overall in (("shared", 0.9), ("random", 0.8))
        for seed in (0, 1, 2)
    ]
    other = evaluation("match", 0.99, renoise="shared", seed=0, stage="match", trained=9600)
    log(tmp_path / "evaluations.jsonl", [*lines, other])
    text = page(tmp_path)
    assert "| shared | mean | 4800 | 92.0 ± 2.0 |" in text
    assert "| random | mean | 4800 | 82.0 ± 2.0 |" in text and "| shared | 0 | 9600 |" not in text
    claim = "re-noising by two standard errors, mean of seeds"
    error = (2 * 0.02**2 / 3) ** 0.5
    assert f"{claim} | 92.0 % | {82 + 200 * error:.1f} % | yes |" in text
    for line in lines[3:]:
        line["overall"] += 0.09  # above still, but by less than seeds differ
    log(tmp_path / "evaluations.jsonl", lines)
    assert f"{claim} | 92.0 % | {91 + 200 * error:.1f} % | no |" in page(tmp_path)


def test_says_of_each_claim_whether_it_holds(tmp_path):
    lines = [
        evaluation("teacher", 0.93, steps=50, cfg=2.0),
        evaluation("split", 0.92),
        evaluation("split", 0.96, encoders="both"),
        evaluation("split", 0.88, steps=2),
    ]
    log(tmp_path / "evaluations.jsonl", lines)
    times = [
        {"name": "teacher", "seconds": 1.0},  # an older line
        {"name": "teacher", "seconds": 1.9, "sampling": 1.7, "processor": "AVX2", "threads": 2},
        {"name": "split", "seconds": 0.1, "sampling": 0.095, "processor": "AVX2", "threads": 2},
        {"name": "split", "seconds": 0.1, "sampling": 0.09, "processor": "AMX", "threads": 2},
    ]
    eight = [row | {"pictures": 8, "seconds": row["seconds"] + 0.1} for row in times[1:]]
    log(tmp_path / "times.jsonl", times + eight)
    turn = {"teacher": {"sampling": 1000, "VAE": 8}, "student": {"sampling": 40, "VAE": 8}}
    sized = {"setting": {"device": "cpu"}, "rows": [{"pixels": 512, "turns": [turn]}]}
    (tmp_path / "distilled-cpu.json").write_text(json.dumps(sized))
    claims = page(tmp_path).split("## ")[1]
    assert "in 50 with CFG | 92.0 % | 93.0 % | no |" in claims
    assert "at least 90 % | 92.0 % | 90.0 % | yes |" in claims
    assert "0.95 of 4 steps | 88.0 % | 87.4 % | yes |" in claims
    assert ", a picture at a time, AVX2, 2 threads | 19.0 times | 18.0 times | yes |" in claims
    assert ", 8 pictures at once, AVX2, 2 threads | 10.0 times | 18.0 times | no |" in claims
    assert "AMX" not in page(tmp_path)  # no teacher was timed there
    speeds = page(tmp_path).split("## Seconds a picture")[1].split("##")[0]
    seconds = "0.100 s | 1.900 s | 19.0 | 0.095 s | 1.700 s | 17.9"
    assert f"| a picture at a time | AVX2 | 2 threads | {seconds} |" in speeds
    assert "less than with it | 92.0 % | 91.0 % | yes |" in claims
    assert "a picture of 512², cpu | 21.0 times | 18.0 times | yes |" in claims
    assert claims.count("| yes |") + claims.count("| no |") == 7  # of what was measured


def test_scores_are_compared_on_the_same_captions(tmp_path):
    lines = [
        evaluation("split", 0.97),
        evaluation("split", 0.92, captions=1000),
        evaluation("split", 0.99, encoders="both"),
        evaluation("teacher", 0.94, steps=50, cfg=2.0, captions=1000),
    ]
    log(tmp_path / "evaluations.jsonl", lines)
    text = page(tmp_path)
    assert "in 50 with CFG | 92.0 % | 94.0 % | no |" in text
    assert "less than with it | 97.0 % | 94.0 % | yes |" in text
    assert "| split | 4 | no t5 | 97.0 |" in text and "| split | 4 | no t5 | 92.0 |" not in text
    table = text.split("## Teacher and students")[1].split("## ")[0]
    assert table.count("| split | 4 |") == 1 and "| 92.0 | 50.0 |" in table


def test_a_folder_without_scores_and_a_broken_log_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"holds no evaluations\.jsonl: score a run first"):
        page(tmp_path)
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(evaluation("a", 0.5)) + "\n{")
    with pytest.raises(ValueError, match=r"evaluations\.jsonl, line 2, is no JSON object"):
        page(tmp_path)
    (tmp_path / "evaluations.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"evaluations\.jsonl, line 1, is no JSON object"):
        page(tmp_path)
    (tmp_path / "evaluations.jsonl").write_text('{"name": "a"}')
    with pytest.raises(ValueError, match=r"line 1, lacks encoders, steps, .*frechet: .*\"a\""):
        page(tmp_path)
    log(tmp_path / "evaluations.jsonl", [evaluation("a", "0.5")])
    with pytest.raises(ValueError, match=r"evaluations\.jsonl, line 1, lacks overall: delete"):
        page(tmp_path)


def test_other_lines_and_files_are_passed_over(tmp_path):
    log(tmp_path / "evaluations.jsonl", [evaluation("match", 0.5, stage="match")])
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write("\n")
    times = {"seconds": 1.0, "sampling": 0.5, "processor": "AVX2"}  # without threads
    log(tmp_path / "times.jsonl", [times | {"name": name} for name in ("teacher", "split")])
    log(tmp_path / "captions.jsonl", [{"words": "a red circle"}])
    lengths = page(tmp_path).split("## How long")[1]
    assert "| captions |" not in lengths


def test_an_empty_log_gives_empty_tables(tmp_path):
    (tmp_path / "evaluations.jsonl").touch()
    lines = [line for line in page(tmp_path).splitlines() if line.startswith("|")]
    claimed = [line for line in lines if "|  |  | not measured |" in line]
    assert len(claimed) == 12 and len(lines) == 20 + len(claimed)


def test_a_stage_is_better_only_by_more_than_chance(tmp_path):
    claim = "split-timestep fine-tuning above none by two standard errors"
    alike = dict.fromkeys(CATEGORIES, 0.9)
    lines = [evaluation("match", 0.9, **alike), evaluation("split", 0.95, **alike)]
    log(tmp_path / "evaluations.jsonl", lines)
    # thirds of 30 captions, of which two, three and one categories ask
    error = (0.09 / 10 * (2**2 + 3**2 + 1) / 36) ** 0.5
    bar = 90 + 200 * error * 2**0.5
    assert f"{claim} | 95.0 % | {bar:.1f} % | no |" in page(tmp_path)
    for line in lines:
        line["captions"] = 30000
    log(tmp_path / "evaluations.jsonl", lines)
    assert f"{claim} | 95.0 % | 90.5 % | yes |" in page(tmp_path)


def test_what_ships_is_told_by_each_scorer(tmp_path):
    (tmp_path / "evaluations.jsonl").touch()
    same = dict.fromkeys([*CATEGORIES, "right", "agree"], 0.5) | {"captions": 30, "sha256": "ab"}
    lines = [
        {"name": f"fewstep-{name}.gguf", "steps": steps, "cfg": cfg, "scorer": scorer}
        | same
        | {"overall": overall}
        for name, steps, cfg, overall in (("demo", 4, 1.0, 0.97), ("teacher", 50, 2.0, 0.96))
        for scorer in ("one", "two")
    ]
    lines[-1]["overall"] = 0.98
    log(tmp_path / "shipped.jsonl", lines)
    text = page(tmp_path)
    assert "the files that ship, seen by one | 97.0 % | 96.0 % | yes |" in text
    assert "the files that ship, seen by two | 97.0 % | 98.0 % | no |" in text
    half = " | ".join(["50.0"] * 6)
    assert f"| fewstep-demo.gguf | ab | 4 | 1 | one | {half} | 97.0 | 50.0 | 50.0 | 30 |" in text
    assert "| shipped |" not in text
