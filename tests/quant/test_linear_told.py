"""test_linear.py and test_conv.py as on a CPU with no more than AVX2, where this one has more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

llvm = pytest.importorskip("llvmlite.binding")
TOLD = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}


@pytest.mark.parametrize("name", ["test_linear.py", "test_conv.py"])
def test_as_a_cpu_without_avx_512(name):
    has = dict(llvm.get_host_cpu_features())
    if not (has.get("avx512f") and has.get("fma")):
        pytest.skip("it has no more, or less")
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name(name))]
    done = subprocess.run(command, env=os.environ | TOLD, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
    assert "skipped" not in done.stdout
