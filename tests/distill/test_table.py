"""The page is made from the logs alone."""

import json

from fewstep.distill.table import CATEGORIES, page, rows


def log(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluation(name, overall, **others):
    shares = dict.fromkeys([*CATEGORIES, "right"], 0.5)
    drawn = {"name": name, "steps": 4, "cfg": 1.0, "encoders": "both", "captions": 30}
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
    assert f"| match | 4 | 1 | both | {half} | 91.0 | 50.0 | 0.0100 | 1.50 s | 30 |" in text
    assert "| split | 0.7 | 92.0 | 50.0 |" in text
    assert "| match | shared | 0.9 | 412 | 16 |" in text
    assert "| match | 50 | 800 | 4 |" in text and "| evaluations |" not in text


def test_an_empty_folder_gives_empty_tables(tmp_path):
    assert sum(line.startswith("|") for line in page(tmp_path).splitlines()) == 8
