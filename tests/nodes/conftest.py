"""The real ComfyUI in this process: `import comfy` works in the test modules of this folder."""

import pytest
import torch
from fewstep.tests import in_process

in_process.prepare()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
