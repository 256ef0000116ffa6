"""ComfyUI in this process for every test of the tier, before its modules are imported."""

import pytest
import torch
from fewstep.tests import in_process

in_process.prepare()
torch.set_num_threads(1)  # toy models: threads cost more than they bring


@pytest.fixture
def exact(monkeypatch):
    """The host as started with options that ask for float32: no product is rounded to bfloat16."""
    from comfy.cli_args import args

    monkeypatch.setattr(args, "fp32_unet", True)
    monkeypatch.setattr(args, "fp32_text_enc", True)
