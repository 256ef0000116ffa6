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
        (["match", "--model", "lost.gguf", "--prompts", "lost.txt"], {}, "no file lost.gguf"),
        (["match", "--model", __file__, "--prompts", "lost.txt"], {}, "lost.txt"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, arguments, environment, told):
    said = distill(*arguments, "--folder", tmp_path, **environment)
    assert said.returncode == 1 and said.stdout == ""
    last = said.stderr.splitlines()[-1]
    assert last.startswith("python -m distill: ") and told in last
    assert "Traceback" not in said.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    said = distill("match", "--name", "../other", "--folder", tmp_path)
    assert said.returncode == 2 and "'../other' is no name of a run" in said.stderr


def test_settings_add_up_over_several_options(tmp_path):
    said = distill("match", "--set", "nothing=2", "--set", "seed=1", "--folder", tmp_path)
    assert said.returncode == 1 and "nothing" in said.stderr.splitlines()[-1]
