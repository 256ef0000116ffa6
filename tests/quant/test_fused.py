"""Which way a packed matrix is multiplied, by a clock of the test's own: no GPU is needed."""

import importlib
import logging
import sys

import pytest
import torch
from fewstep.quant import fused, multiply_fused, prefers_fused
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

ROWS, COLUMNS = 96, 256


class Kernels:
    """As quant/triton_linear.py, with a clock that says what it is told to, in milliseconds."""

    COMPILED, DTYPES, FAILURES = {T.Q4_K, T.Q8_0}, {torch.float32, torch.float16}, (RuntimeError,)

    def __init__(self):
        self.fused, self.plain, self.error = 1.0, 2.0, None
        self.calls, self.timed = 0, 0

    def linear(self, blocks, qtype, x, bias=None):
        self.calls += 1
        if self.error:
            raise self.error
        return x.new_zeros(len(x), len(blocks))

    def milliseconds(self, run, device):
        self.timed, before = self.timed + 1, self.calls
        run()
        return self.fused if self.calls > before else self.plain


def found(kernels, monkeypatch):
    """`kernels`, where a device's are looked for, with nothing timed yet and nothing failed."""
    monkeypatch.setattr(fused, "_found", lambda device: kernels)
    monkeypatch.setattr(fused, "_faster", {})
    monkeypatch.setattr(fused, "_failed", set())
    return kernels


@pytest.fixture
def kernels(monkeypatch):
    return found(Kernels(), monkeypatch)


def blocks(qtype=T.Q4_K, rows=ROWS, columns=COLUMNS):
    size, width = GGML_QUANT_SIZES[qtype]
    return torch.zeros(rows, columns // size * width, dtype=torch.uint8)


def asked(vectors=7, qtype=T.Q4_K, dtype=torch.float32, rows=ROWS, columns=COLUMNS):
    return prefers_fused(
        blocks(qtype, rows, columns), qtype, torch.zeros(vectors, columns, dtype=dtype)
    )


@pytest.mark.parametrize(("time", "chosen"), [(1.0, True), (1.79, True), (1.9, False), (3, False)])
def test_the_faster_is_chosen_and_a_near_tie_goes_to_torch(kernels, time, chosen):
    kernels.fused = time
    assert asked() == chosen


def test_each_kind_of_product_is_timed_once(kernels):
    for vectors in (5, 8, 6, 5):
        assert asked(vectors)
    assert kernels.timed == 2  # one of each way
    kernels.fused = 3.0  # nobody asks again
    assert asked(7) and not asked(9) and asked(8)
    assert kernels.timed == 4


@pytest.mark.parametrize(
    "other",
    [
        {"vectors": 1},
        {"vectors": 77},
        {"qtype": T.Q8_0},
        {"dtype": torch.float16},
        {"rows": 512},
        {"columns": 1024},
    ],
    ids=str,
)
def test_a_product_of_another_kind_is_timed_by_itself(kernels, other):
    assert asked()
    kernels.fused = 3.0
    assert not asked(**other) and asked()


@pytest.mark.parametrize(
    "other",
    [
        {"vectors": 0},
        {"vectors": fused.MOST + 1},
        {"qtype": T.IQ2_XXS},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_what_has_no_kernel_is_not_timed(kernels, other):
    assert not asked(**other)
    assert not kernels.timed


def test_rows_that_are_not_whole_blocks_are_left_alone(kernels):
    assert not prefers_fused(blocks(), T.Q4_K, torch.zeros(7, 128))
    assert not prefers_fused(blocks().view(1, -1), T.Q4_K, torch.zeros(7, COLUMNS))
    assert not kernels.timed


def test_a_cuda_graph_is_not_disturbed(kernels, monkeypatch):
    monkeypatch.setattr(fused, "_captured", lambda device: True)
    assert not asked() and not kernels.timed
    monkeypatch.setattr(fused, "_captured", lambda device: False)
    assert asked()


def test_no_gpu_no_kernel():
    assert not asked()
    assert multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS)) is None


def test_a_kernel_that_cannot_be_built_is_told_once_and_done_without(kernels, caplog):
    kernels.error = RuntimeError("Failed to find C compiler")
    assert not asked(7) and not asked(77) and not asked(7)
    assert multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS)) is None
    assert kernels.calls == 1
    assert caplog.text.count("Failed to find C compiler") == 1


def test_so_is_one_that_fails_later(kernels, caplog):
    assert asked()
    kernels.error = RuntimeError("out of resource: shared memory")
    for _ in range(2):
        assert multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS)) is None
    assert not asked() and kernels.calls == 2
    assert caplog.text.count("out of resource") == 1


def test_no_memory_for_timing_means_torch_and_in_a_product_is_the_hosts_matter(kernels):
    kernels.error = torch.OutOfMemoryError("none left")
    assert not asked(7)
    with pytest.raises(torch.OutOfMemoryError):
        multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS))
    kernels.error = None
    assert not asked(7) and asked(77)  # of the first kind it is settled


def test_without_triton_it_says_so_and_torch_multiplies(monkeypatch, caplog):
    name = "fewstep.quant.triton_linear"
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(sys.modules, "fewstep.quant.triton_dequant", raising=False)
    fused._found.cache_clear()
    with caplog.at_level(logging.INFO, logger="fewstep.quant.kernels"):
        assert fused._found("cuda") is None and fused._found("cuda") is None
    assert caplog.text.count("multiplying few vectors on cuda without triton") == 1
    fused._found.cache_clear()
    monkeypatch.undo()
    pytest.importorskip("triton")
    assert importlib.import_module(name).linear
