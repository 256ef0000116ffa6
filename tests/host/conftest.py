"""ComfyUI in this process for every test of the tier, before its modules are imported."""

from fewstep.tests import in_process

in_process.prepare()
