"""ComfyUI in this process, as for tests/host: what is trained here are its networks."""

import pytest
import torch
from fewstep.tests import in_process

in_process.prepare()
torch.set_num_threads(1)  # toy models: threads cost more than they bring

from fewstep.tests.distill.toy_runs import MATCH, SIZES, STUDENT, write  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "teacher", "teacher", SIZES)
    write(tmp_path, "first", "trajectory", STUDENT | {"batches": 2}, teacher="teacher")
    write(tmp_path, "second", "match", MATCH, teacher="teacher", start="first")
    write(tmp_path, "third", "match", MATCH | {"ema": 0.5}, teacher="teacher", start="second")
    return tmp_path
