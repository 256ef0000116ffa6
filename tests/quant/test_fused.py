"""Which way a packed matrix is multiplied, by a clock of the test's own: no GPU is needed."""

import importlib
import logging
import sys
from collections import Counter
from contextlib import nullcontext
from threading import Thread
from time import sleep
from types import ModuleType

import pytest
import torch
from fewstep.quant import fused, multiply_fused, prefers_fused
from fewstep.quant.kernels import Fallback
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

ROWS, COLUMNS = 96, 256


class Kernels:
    """As quant/triton_linear.py, with a clock that says what it is told to, in milliseconds."""

    COMPILED, DTYPES = {T.Q4_K, T.Q8_0}, {torch.float32, torch.float16}
    FAILURES, OF_A_KIND = (Exception,), (KeyError,)

    def __init__(self):
        self.fused, self.plain, self.error, self.torchs_error = 1.0, 2.0, None, None
        self.calls, self.timed = 0, 0

    def linear(self, blocks, qtype, x, bias=None):
        self.calls += 1
        if self.error:
            raise self.error
        return x.new_zeros(len(x), len(blocks))

    def milliseconds(self, run, device):
        self.timed, before = self.timed + 1, self.calls
        run()
        if self.calls > before:
            return self.fused
        if self.torchs_error:
            raise self.torchs_error
        return self.plain


def found(kernels, monkeypatch):
    """`kernels`, where a device's are looked for, with nothing timed yet and nothing failed."""
    monkeypatch.setattr(fused, "_kernels", lambda device: kernels)
    monkeypatch.setattr(fused, "_faster", {})
    monkeypatch.setattr(fused, "_tries", Counter())
    monkeypatch.setattr(fused, "_fallback", Fallback("multiplying few vectors"))
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
    kernels.error = RuntimeError("no such GPU")
    for _ in range(2):
        assert multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS)) is None
    assert not asked() and kernels.calls == 2
    assert caplog.text.count("no such GPU") == 1


def test_one_kernel_that_cannot_be_built_leaves_the_others(kernels, caplog):
    kernels.error = KeyError("out of resource: shared memory")
    assert not asked()
    kernels.error = None
    assert not asked() and asked(77) and asked(qtype=T.Q8_0)
    assert multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS)) is None
    assert caplog.text.count("out of resource") == 1


def test_a_driver_without_memory_is_asked_again(kernels):
    assert asked()
    kernels.error = RuntimeError("Triton Error [CUDA]: out of memory")
    assert multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS)) is None
    kernels.error = None
    assert multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS)) is not None


def test_memory_and_gpu_are_the_hosts_matter_in_a_product(kernels):
    errors = [torch.OutOfMemoryError("none left")]
    if hasattr(torch, "AcceleratorError"):
        errors.append(torch.AcceleratorError("illegal memory access"))
    for kernels.error in errors:
        with pytest.raises(type(kernels.error)):
            multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS))
    kernels.error = None
    assert asked()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("none left"), RuntimeError("CUDA error: out of memory")]
)
def test_where_memory_lacked_timing_is_tried_again_but_not_for_ever(kernels, error):
    kernels.error = error
    assert not asked()
    kernels.error = None
    assert asked()
    kernels.error = error
    for _ in range(fused.TRIES):
        assert not asked(77)
    kernels.error = None
    assert not asked(77) and asked(400)


def test_torchs_own_failure_in_timing_is_not_held_against_the_kernel(kernels):
    kernels.torchs_error = RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
    assert not asked()
    assert multiply_fused(blocks(), T.Q4_K, torch.zeros(7, COLUMNS)) is not None
    kernels.torchs_error = None
    assert asked()


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="an older torch")
@pytest.mark.parametrize("side", ["error", "torchs_error"])
def test_a_gpu_that_fails_in_timing_is_the_hosts_matter(kernels, side):
    setattr(kernels, side, torch.AcceleratorError("illegal memory access"))
    with pytest.raises(torch.AcceleratorError):
        asked()


def test_two_threads_time_a_kind_once(kernels, monkeypatch):
    timed = kernels.milliseconds
    monkeypatch.setattr(kernels, "milliseconds", lambda *given: sleep(0.05) or timed(*given))
    threads = [Thread(target=asked) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernels.timed == 2  # one of each way


def test_a_graph_is_looked_for_where_the_vectors_are(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: entered.append(gpu) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(entered))
    assert fused._captured(torch.device("cuda:1")) and entered == [torch.device("cuda:1")]
    assert not fused._captured(torch.device("cpu"))


class Broken(ModuleType):
    """A package that is there, but whose library does not load."""

    def __getattr__(self, name):
        raise OSError("DLL load failed")


@pytest.mark.parametrize("triton", [None, Broken("triton")], ids=["missing", "broken"])
def test_without_triton_it_says_so_and_torch_multiplies(monkeypatch, caplog, triton):
    name = "fewstep.quant.triton_linear"
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(sys.modules, "fewstep.quant.triton_dequant", raising=False)
    fused._kernels.cache_clear()
    with caplog.at_level(logging.INFO, logger="fewstep.quant.kernels"):
        assert fused._kernels("cuda") is None and fused._kernels("cuda") is None
    assert caplog.text.count("multiplying few vectors on cuda without triton") == 1
    fused._kernels.cache_clear()
    monkeypatch.undo()
    pytest.importorskip("triton")
    assert importlib.import_module(name).linear
