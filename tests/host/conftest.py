"""ComfyUI in this process for every test of the tier, before its modules are imported."""

import torch
from fewstep.tests import in_process

in_process.prepare()
torch.set_num_threads(1)  # toy models: threads cost more than they bring
