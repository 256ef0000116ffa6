"""The command line as its users have it: what is wrong is told in one line, and nothing is left."""

import os
import subprocess
import sys

import pytest
from fewstep import run


def distill(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "distill", *map(str, arguments)],
        cwd=run.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["match"], {}, "train the run teacher first"),
        (["match"], {"WORLD_SIZE": "2"}, "the miniature is trained by one"),
        (["match", "--model", "lost.gguf", "--prompts", "lost.txt"], {}, "lost.txt"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, arguments, environment, told):
    said = distill(*arguments, "--folder", tmp_path, **environment)
    assert said.returncode == 1 and said.stdout == ""
    last = said.stderr.splitlines()[-1]
    assert last.startswith("python -m distill: ") and told in last
    assert "Traceback" not in said.stderr
    assert list(tmp_path.iterdir()) == []
