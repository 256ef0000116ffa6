"""The GPU's kernels against the torch formulation, in Triton's interpreter, which needs no GPU."""

import importlib
import logging
import sys

import numpy as np
import pytest
import torch
from fewstep.quant import QTYPES, dequantize, quantize
from fewstep.quant.kernels import Fallback

pytest.importorskip("triton")
errors = importlib.import_module("triton.runtime.errors")
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


def test_blocks_that_no_word_can_be_read_of_are_moved(kernels):
    blocks = random_blocks(TYPES[0], 4)
    odd = torch.empty(blocks.numel() + 1, dtype=torch.uint8)[1:].view_as(blocks).copy_(blocks)
    moved = kernels.aligned(odd)
    assert moved.data_ptr() % 4 == 0 and torch.equal(moved, blocks)
    assert kernels.aligned(blocks) is blocks


def test_only_types_that_look_codes_up_get_the_table(kernels):
    cpu = torch.device("cpu")
    tabled = {qtype.name for qtype in TYPES if kernels.levels(qtype, cpu) is not None}
    assert tabled == {"IQ4_NL", "IQ4_XS"}


def test_the_wait_for_a_kernel_is_told_once(kernels, caplog):
    blocks, out = random_blocks(TYPES[0], 4), torch.empty(4, 32)
    with caplog.at_level(logging.INFO, logger=NAME):
        for _ in range(2):
            kernels.unpack(blocks, TYPES[0], out)
    assert caplog.text.count("building Triton kernels for dequantising Q8_0") == 1


class Failing:
    """A kernel that raises when it is started."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __getitem__(self, grid):
        self.calls += 1
        raise self.error


@pytest.fixture
def failing(kernels, monkeypatch):
    """Triton's kernels, in use, that fail by a given error."""

    def fail(error):
        monkeypatch.setattr(kernels, "_dequantize", Failing(error))
        monkeypatch.setattr(DEQUANT, "_kernels", lambda device: kernels)
        monkeypatch.setattr(DEQUANT, "_fallback", Fallback("dequantising"))
        return kernels._dequantize

    return fail


def dequantised(qtype=TYPES[0], dtype=torch.float32):
    blocks = random_blocks(qtype, 4)
    got = dequantize(blocks, qtype, (4, QTYPES[qtype].block_size), dtype)
    wanted = QTYPES[qtype].dequantize_blocks(blocks).to(dtype)
    return torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler"),
        ImportError("DLL load failed"),
        AssertionError("computeCapability not supported"),
        KeyError("sm_130"),
        AttributeError("no attribute get_current_device"),
        ValueError("type fp8e4nv not supported"),
        OSError("libcuda.so"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_kernel_that_cannot_be_built_is_told_once_and_done_without(failing, caplog, error):
    kernel = failing(error)
    for _ in range(3):
        dequantised()
    dequantised(TYPES[1])
    assert kernel.calls == 1
    assert caplog.text.count(str(error)) == 1


@pytest.mark.parametrize(
    "error",
    [errors.OutOfResources(99, 48, "shared memory"), errors.PTXASError("no such feature")],
    ids=lambda error: type(error).__name__,
)
def test_one_kernel_that_cannot_be_built_leaves_the_others(failing, caplog, error):
    kernel = failing(error)
    for kind in [()] * 2 + [(TYPES[1],)] * 2 + [(TYPES[0], torch.float16)]:
        dequantised(*kind)
    assert kernel.calls == 3
    assert "dequantising of Q8_0 in torch.float32 on cpu by plain torch" in caplog.text


@pytest.mark.parametrize("said", ["Triton Error [CUDA]: out of memory", "CUBLAS_ALLOC_FAILED"])
def test_a_driver_without_memory_is_asked_again(failing, caplog, said):
    kernel = failing(RuntimeError(said))
    for calls in (1, 2, 3):
        dequantised()
        assert kernel.calls == calls
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize("name", ["OutOfMemoryError", "AcceleratorError"])
def test_no_memory_is_not_taken_for_a_missing_compiler(failing, name):
    if not hasattr(torch, name):
        pytest.skip("an older torch")
    kernel = failing(getattr(torch, name)("none left"))
    for calls in (1, 2):
        with pytest.raises(type(kernel.error)):
            dequantised()
        assert kernel.calls == calls
