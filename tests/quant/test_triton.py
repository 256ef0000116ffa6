"""The GPU's kernels against the torch formulation, in Triton's interpreter, which needs no GPU."""

import importlib
import sys

import numpy as np
import pytest
import torch
from fewstep.quant import QTYPES, dequantize, quantize

pytest.importorskip("triton")
DEQUANT = importlib.import_module("fewstep.quant.dequant")
NAME = "fewstep.quant.triton_dequant"
FAMILIES = ("Q8_0", "Q5_", "Q4_", "Q6_K", "Q3_K", "Q2_K", "IQ4_")
TYPES = [qtype for qtype in QTYPES if qtype.name.startswith(FAMILIES)]


def random_blocks(qtype, n):
    """Any half is among the scales, so also infinity, NaN and subnormals."""
    generator = torch.Generator().manual_seed(int(qtype))
    size = (n, QTYPES[qtype].type_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # looked at when a kernel is defined
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME)


@pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)
def test_numbers_equal_the_torch_formulations(kernels, qtype):
    n, row = 4096 // QTYPES[qtype].block_size + 3, QTYPES[qtype]  # two programs, one hardly used
    blocks = random_blocks(qtype, n)
    expected, out = row.dequantize_blocks(blocks), torch.zeros(n + 1, row.block_size)
    with np.errstate(all="ignore"):  # the interpreter's, at NaN and infinity
        kernels.unpack(blocks, qtype, out[:n])
    number = ~expected.isnan()
    assert torch.equal(out[:n].isnan(), ~number)
    assert torch.equal(out[:n][number].view(torch.int32), expected[number].view(torch.int32))
    assert not out[n].any()


def test_every_type_that_has_a_kernel_is_tried(kernels):
    assert set(TYPES) == kernels.COMPILED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_the_float32s_rounded(kernels, dtype):
    """bfloat16 within one step: the interpreter cuts where a GPU rounds."""
    blocks = quantize(torch.randn(8, 32), TYPES[0])
    exact, out = dequantize(blocks, TYPES[0], (8, 32)), torch.empty(8, 32, dtype=dtype)
    kernels.unpack(blocks, TYPES[0], out)
    step = exact.abs() * torch.finfo(dtype).eps
    assert ((out.float() - exact).abs() <= (step / 2 if dtype == torch.float16 else step)).all()


def test_a_kernel_that_cannot_be_built_is_told_once_and_done_without(monkeypatch, caplog):
    class Broken:
        COMPILED, DTYPES, FAILURES = set(TYPES), {torch.float32}, (RuntimeError,)
        calls = 0

        @classmethod
        def unpack(cls, *_):
            cls.calls += 1
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(DEQUANT, "_found", lambda device: Broken)
    monkeypatch.setattr(DEQUANT, "_failed", set())
    blocks = random_blocks(TYPES[0], 4)
    expected = QTYPES[TYPES[0]].dequantize_blocks(blocks)
    for _ in range(3):
        assert torch.equal(dequantize(blocks, TYPES[0], (4, 32)), expected)
    assert Broken.calls == 1
    assert caplog.text.count("Failed to find C compiler") == 1


def test_no_memory_is_not_taken_for_a_missing_compiler(monkeypatch):
    class Full:
        COMPILED, DTYPES, FAILURES = set(TYPES), {torch.float32}, (RuntimeError,)

        @staticmethod
        def unpack(*_):
            raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(DEQUANT, "_found", lambda device: Full)
    monkeypatch.setattr(DEQUANT, "_failed", set())
    with pytest.raises(torch.OutOfMemoryError):
        dequantize(random_blocks(TYPES[0], 4), TYPES[0], (4, 32))
    assert not DEQUANT._failed
