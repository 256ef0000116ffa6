"""`quant` stands alone: as a top-level package, from anywhere, without ComfyUI."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
USE_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import quant, torch
blocks = torch.zeros(2, 34, dtype=torch.uint8)
assert quant.dequantize(blocks, 8, (2, 32)).sum() == 0
assert torch.equal(quant.quantize(torch.zeros(2, 32), 8), blocks)
quant.write_gguf("a.gguf", "sd3", {}, [("a", (blocks, 8, (2, 32)))])
assert torch.equal(quant.GGUFFile("a.gguf").blocks("a"), blocks)
foreign = {name.split(".")[0] for name in sys.modules}
print(foreign & {"comfy", "comfy_api", "comfy_kitchen", "folder_paths", "nodes", "fewstep"})
"""


def test_works_as_a_top_level_package(tmp_path):
    command = [sys.executable, "-W", "error", "-c", USE_ALONE, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
