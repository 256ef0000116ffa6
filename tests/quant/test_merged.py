"""Dequantising with LoRAs in the weights, by torch and in Triton's interpreter, against float64;
and that Triton can build it for GPUs.
"""

import importlib
import logging

import pytest
import torch
from fewstep.quant import QTYPES, dequantize, dequantize_merged
from fewstep.quant.kernels import Fallback
from fewstep.tests.quant.interpreted import builder, fixtures
from fewstep.tests.quant.test_linear import matrix, normal
from fewstep.tests.quant.test_triton import TYPES, Failing
from fewstep.tests.quant.test_triton_linear import GPUS, PRODUCT, ROUNDING
from gguf import GGMLQuantizationType as T

triton = pytest.importorskip("triton")
MERGED = importlib.import_module("fewstep.quant.merged")
NAMES = ("fewstep.quant.triton_merged", "fewstep.quant.triton_dequant")
ROWS = 70  # one program's and a part of another's

kernels, for_gpus = fixtures(*NAMES)


@pytest.fixture
def in_use(kernels, monkeypatch):
    """Triton's kernels, for tensors of the CPU."""
    monkeypatch.setattr(MERGED, "_kernels", lambda device: kernels)
    monkeypatch.setattr(MERGED, "_fallback", Fallback("adding LoRAs"))
    return kernels


def case(qtype, dtype, rank=16, columns=None):
    """(blocks, qtype, up, down, out), and what is to come out, in float64."""
    columns = columns or 3 * QTYPES[qtype].block_size
    blocks, _, weight = matrix(qtype, ROWS, columns)
    size = weight.abs().mean().item() / rank**0.5
    up, down = normal(rank, ROWS).to(dtype), (size * normal(columns, rank, seed=1)).to(dtype)
    out = torch.full(weight.shape, torch.nan, dtype=dtype)
    return (blocks, qtype, up, down, out), weight + (down.double() @ up.double()).T


def excess(made, truth):
    """The largest error, as a share of what the roundings allow: of the result, and of float32's
    sums, whose every step errs by 2**-24 of what it has so far, at the most.
    """
    _, _, up, down, out = made
    sizes = truth.abs() + (down.double().abs() @ up.double().abs()).T
    allowed = ROUNDING[out.dtype] * truth.abs() + (len(up) + 2) * 2**-24 * sizes
    return ((out.double() - truth).abs() / allowed).max().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)
def test_every_type_is_rounded_once(kernels, qtype, dtype):
    made, truth = case(qtype, dtype)
    kernels.merge(*made)
    assert excess(made, truth) < 1


@pytest.mark.parametrize("rank", [1, 12, 64, 100])
@pytest.mark.parametrize("qtype", [T.Q4_0, T.Q8_0, T.Q4_K], ids=lambda qtype: qtype.name)
def test_any_rank(kernels, qtype, rank):
    made, truth = case(qtype, torch.float16, rank, columns=1280)  # programs beside one another
    kernels.merge(*made)
    assert excess(made, truth) < 1


def test_every_type_that_is_unpacked_is_merged(kernels):
    assert set(TYPES) == kernels.COMPILED


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("qtype", [T.Q6_K, T.IQ2_S], ids=lambda qtype: qtype.name)
def test_so_does_torch_round_once_a_few_rows_at_a_time(monkeypatch, qtype, dtype):
    monkeypatch.setattr(MERGED, "_CPU_TILE", 3000)
    made, truth = case(qtype, dtype)
    assert dequantize_merged(*made) is made[-1]
    assert excess(made, truth) < 1


def test_a_lora_far_below_the_types_step_still_counts():
    """Weights lie between two numbers of bfloat16; what is added moves some past the middle."""
    made, _ = case(T.Q6_K, torch.bfloat16)
    blocks, qtype, up, down, out = made
    down *= 2**-9
    plain = dequantize(blocks, qtype, out.shape).double()
    moved = dequantize_merged(*made).double() - plain.bfloat16().double()
    wanted = (down.double() @ up.double()).T
    assert wanted.abs().mean() < 2**-9 * plain.abs().mean()
    assert (moved * wanted).sum() / (wanted * wanted).sum() == pytest.approx(1, abs=0.1)


def test_the_kernel_is_asked_for_where_there_is_one(in_use, monkeypatch):
    calls, merge = [], in_use.merge
    monkeypatch.setattr(in_use, "merge", lambda *given: calls.append(given) or merge(*given))
    for qtype, dtype, rank in (
        (T.Q4_K, torch.bfloat16, 16),
        (T.IQ2_S, torch.bfloat16, 16),  # a type without one
        (T.Q4_K, torch.float32, 16),
        (T.Q4_K, torch.bfloat16, in_use.MOST + 1),
    ):
        made, truth = case(qtype, dtype, rank)
        assert excess((*made[:-1], dequantize_merged(*made)), truth) < 1
    assert len(calls) == 1


def test_a_kernel_that_fails_leaves_it_to_torch_and_says_so_once(in_use, monkeypatch, caplog):
    failing = Failing(RuntimeError("no such GPU"))
    monkeypatch.setattr(in_use, "_merge", failing)
    for _ in range(2):
        made, truth = case(T.Q4_K, torch.float16)
        dequantize_merged(*made)
        assert excess(made, truth) < 1
    assert caplog.text.count("no such GPU") == failing.calls == 1


def test_the_wait_for_a_kernel_is_told(in_use, caplog):
    with caplog.at_level(logging.INFO, logger=NAMES[1]):
        dequantize_merged(*case(T.Q8_0, torch.float16)[0])
    assert "building Triton kernels for adding LoRAs while dequantising Q8_0" in caplog.text


def build(kernels, qtype, R, gpu=GPUS["sm_80"]):
    return builder(gpu).merge(kernels, importlib.import_module(NAMES[1]), qtype, R, gpu).asm


@pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)
def test_a_gpus_compiler_takes_it(for_gpus, qtype):
    made = build(for_gpus, qtype, 64)
    assert "mma.sync" in made["ptx"]  # tensor cores multiply
    assert "STG" in made["sass"] and "STL" not in made["sass"]  # stores, but none of a spill


@pytest.mark.parametrize("R", [16, 256])
@pytest.mark.parametrize("gpu", GPUS)
def test_so_do_the_compilers_of_others(for_gpus, gpu, R):
    made = build(for_gpus, T.Q4_K, R, GPUS[gpu])
    assert PRODUCT.search(made["amdgcn" if gpu == "gfx1100" else "ptx"])
    assert "STL" not in made.get("sass", "")
