"""The real ComfyUI in this process: `import comfy` works in the test modules of this folder."""

from fewstep.tests import in_process

in_process.prepare()
