"""ComfyUI in this process, as for tests/host: what is trained here are its networks."""

import torch
from fewstep.tests import in_process

in_process.prepare()
torch.set_num_threads(1)  # toy models: threads cost more than they bring
