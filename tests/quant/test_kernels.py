"""Which kernels are asked for on which GPU, with stand-ins for the GPUs: none is needed."""

import importlib

import pytest
import torch
from fewstep.quant import dequantize, fused, multiply_fused, prefers_fused
from fewstep.quant.kernels import Fallback
from fewstep.tests.quant.test_fused import Kernels, blocks
from gguf import GGMLQuantizationType as T

DEQUANT = importlib.import_module("fewstep.quant.dequant")


@pytest.fixture
def gpus(monkeypatch):
    """cuda:0 is of Pascal, cuda:1 of Turing, cuda:2 of Ampere."""
    ages = {0: (6, 1), 1: (7, 5), 2: (8, 6)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ages[device.index])


def allowed(least, device):
    return Fallback("testing").allows((T.Q4_K, torch.float16, torch.device(device)), least)


def test_an_old_gpu_is_left_alone_and_its_neighbour_is_not(gpus):
    assert [allowed((7, 0), f"cuda:{gpu}") for gpu in range(3)] == [False, True, True]
    assert [allowed((8, 0), f"cuda:{gpu}") for gpu in range(3)] == [False, False, True]


def test_compute_capability_is_for_nvidias_gpus(gpus, monkeypatch):
    assert allowed((8, 0), "cpu") and allowed((8, 0), "xpu:0")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert allowed((8, 0), "cuda:0")


def test_the_reason_is_told_once(gpus, caplog):
    fallback = Fallback("testing")
    for qtype in (T.Q4_K, T.Q6_K):
        assert not fallback.allows((qtype, torch.float16, torch.device("cuda:1")), (8, 0))
    assert caplog.text.count("compute capability 7.5, not 8.0") == 1


def test_a_failure_is_that_gpus(gpus):
    fallback, kinds = (
        Fallback("testing"),
        [(T.Q4_K, torch.float16, torch.device("cuda", gpu)) for gpu in (1, 2)],
    )
    fallback.after(RuntimeError("no such GPU"), kinds[0], ())
    assert [fallback.allows(kind, (7, 0)) for kind in kinds] == [False, True]


class Refusing(Fallback):
    """Remembers what it was asked."""

    def allows(self, kind, least):
        self.least = least
        return False


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, (7, 0)), (torch.float16, (7, 0)), (torch.bfloat16, (8, 0))]
)
def test_what_dequantising_asks_for(monkeypatch, dtype, least):
    monkeypatch.setattr(DEQUANT, "_fallback", Refusing("testing"))
    monkeypatch.setattr(Kernels, "DTYPES", {dtype})
    monkeypatch.setattr(DEQUANT, "_kernels", lambda device: Kernels)
    dequantize(blocks(), T.Q4_K, (96, 256), dtype)
    assert DEQUANT._fallback.least == least


def test_what_a_fused_product_asks_for(monkeypatch):
    monkeypatch.setattr(fused, "_kernels", lambda device: Kernels())
    for ask in (prefers_fused, multiply_fused):
        monkeypatch.setattr(fused, "_fallback", Refusing("testing"))
        assert not ask(blocks(), T.Q4_K, torch.zeros(7, 256))
        assert fused._fallback.least == (8, 0)
