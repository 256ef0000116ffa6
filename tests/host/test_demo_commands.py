"""`python -m demo` from end to end, with a training of one step."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def demo(*arguments):
    command = [sys.executable, "-m", "demo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.timeout(900)
def test_trains_exports_and_scores(tmp_path):
    models, sheet = tmp_path / "models", tmp_path / "sheet.png"
    done = demo("train", "--samples", 64, "--folder", tmp_path / "train", "--models", models)
    assert done.returncode == 0, done.stderr
    files = [path for path in models.rglob("*.gguf")]
    assert len(files) == 3 and sum(path.stat().st_size for path in files) < 25e6
    options = ("--models", models, "--captions", 2, "--steps", 2, "--kinds", "single")
    done = demo("score", *options, "--sheet", sheet)
    assert done.returncode == 0, done.stderr
    assert "2 captions, 2 steps: right" in done.stdout
    assert sheet.read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(900)
def test_quantises_scores_and_pictures_the_shipped_model(tmp_path):
    done = demo("quantise", "--captions", 1, "--docs", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "quantised.md").read_text("utf-8")
    for recipe in ("flash-16", "flash-8", "flash-6", "flash-4"):
        assert f"| {recipe} |" in page and f"```\n{recipe}: " in page
    assert "(quantised.png)" in page and page.strip() == done.stdout.strip()
    assert (tmp_path / "quantised.png").read_bytes().startswith(b"\x89PNG")


def test_names_what_it_can_do():
    done = demo("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "export", "score", "quantise"))
