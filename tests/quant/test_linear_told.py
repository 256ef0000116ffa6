"""The CPU's products as on one that has less than this: AVX-512 BF16 without AMX, or AVX2 alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

llvm = pytest.importorskip("llvmlite.binding")
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+ssse3"}
PAIRS = "+avx2,+fma,+ssse3,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512bf16"
BF16 = {"NUMBA_CPU_NAME": "cooperlake", "NUMBA_CPU_FEATURES": PAIRS}
TOLD = [
    ("avx512f", AVX2, "test_linear.py"),
    ("avx512f", AVX2, "test_conv.py"),
    ("amx-bf16", BF16, "test_linear.py"),
    ("amx-bf16", BF16, "test_attention.py"),
    ("avx512bf16", AVX2, "test_dequant.py"),
]


@pytest.mark.parametrize("beyond, told, name", TOLD, ids=[f"{row[0]}-{row[2]}" for row in TOLD])
def test_as_a_cpu_without(beyond, told, name):
    has = dict(llvm.get_host_cpu_features())
    if not (has.get(beyond) and has.get("fma")):
        pytest.skip(f"it has no {beyond} either")
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name(name))]
    done = subprocess.run(command, env=os.environ | told, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
    assert "skipped" not in done.stdout


OLD = """
import logging, sys
from llvmlite import binding
binding.llvm_version_info = (15, 0, 7)
logging.basicConfig()
import run
run.load_pack("fewstep")
import torch
from fewstep.quant import dequantize, multiplies_many
from gguf import GGMLQuantizationType as T
blocks = torch.zeros(96, 210, dtype=torch.uint8)
assert dequantize(blocks, T.Q6_K, (96, 256), torch.bfloat16).eq(0).all()
assert not multiplies_many((96, 210), T.Q6_K, 256, torch.bfloat16)
"""


def test_a_numba_that_does_not_know_bfloat16():
    """numba 0.61's LLVM refuses the instructions that 0.62's takes: torch multiplies, one line says
    so."""
    if not dict(llvm.get_host_cpu_features()).get("avx512bf16"):
        pytest.skip("it has no avx512bf16 either")
    root = Path(__file__).parents[2]
    told = {"cwd": root, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", OLD], **told)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Install numba 0.62") == 1
