"""A quantised matrix times many vectors, LoRAs included, against float64."""

import importlib

import pytest
import torch
from fewstep.quant import (
    PLAIN_QTYPES,
    QTYPES,
    dequantize,
    low_rank_factors,
    multiply_many,
)
from fewstep.quant import threads as threading
from fewstep.quant.threads import in_order
from fewstep.tests.quant.test_dequant import random_blocks
from gguf import GGMLQuantizationType as T

# Weights and vectors are each rounded once, by at most half an eps of a number, and by a quarter in
# the mean; LoRA's inner numbers are rounded once more. The sums are in float32.
DTYPE = pytest.importorskip("fewstep.quant.numba_tile").DTYPE
ERROR = max(torch.finfo(DTYPE).eps / 2, 1e-6)


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    if product(matrix(T.Q8_0, 96, 64), 1) is None:
        torch.set_num_threads(before)
        pytest.skip("no kernel for this CPU, or no numba")
    yield
    torch.set_num_threads(before)


def matrix(qtype, rows, columns):
    """Blocks of ordinary sizes: no half is huge, subnormal or NaN. -> (blocks, qtype, weight)"""
    blocks = torch.from_numpy(random_blocks(qtype, rows * columns // QTYPES[qtype].block_size))
    blocks = (blocks & 0x1F | 0x20).view(rows, -1)
    return blocks, qtype, dequantize(blocks, qtype, (rows, columns)).double()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(made, vectors, bias=None, factors=None):
    blocks, qtype, weight = made
    return multiply_many(blocks, qtype, normal(vectors, weight.shape[1]), DTYPE, bias, factors)


def error(got, truth):
    return ((got - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda t: t.name)
def test_every_type_errs_as_the_rounding_does(qtype):
    made = matrix(qtype, 112, 512)
    got = product(made, 70)
    assert got.dtype == torch.float32 and got.shape == (70, 112)
    assert error(got, normal(70, 512).double() @ made[2].T) < ERROR


@pytest.mark.parametrize("vectors", [1, 15, 16, 33, 48, 64, 77, 130])
@pytest.mark.parametrize(("rows", "columns"), [(96, 256), (208, 512), (400, 2048)])
def test_every_size_and_a_bias(vectors, rows, columns):
    made, bias = matrix(T.Q6_K, rows, columns), 1000 * normal(rows, seed=1)
    got, truth = product(made, vectors, bias), normal(vectors, columns).double() @ made[2].T
    assert error(got - bias, truth) < ERROR + 1e-6 * bias.norm() / made[2].norm()
    assert torch.equal(product(made, vectors, bias), got)


@pytest.mark.parametrize("rank", [1, 4, 32, 100, 200])
@pytest.mark.parametrize("vectors", [5, 77])
def test_factors_of_low_rank_are_added(rank, vectors):
    made = matrix(T.Q4_K, 208, 512)
    up, down = normal(208, rank, seed=2) * made[2].std().float(), normal(rank, 512, seed=3)
    got = product(made, vectors, None, low_rank_factors(up, down))
    truth = normal(vectors, 512).double() @ (made[2] + up.double() @ down.double()).T
    assert error(got, truth) < 1.5 * ERROR


@pytest.mark.parametrize("rows", [96, 208])
def test_a_matrix_that_stays_unpacked_gives_the_same(rows):
    made = matrix(T.Q5_K, rows, 512)
    dense = made[2].to(DTYPE).view(torch.uint8)
    unpacked = dense, PLAIN_QTYPES[DTYPE], made[2]
    assert torch.equal(product(unpacked, 77), product(made, 77))


def test_results_that_go_past_the_cache_are_the_same(monkeypatch):
    made, bias = matrix(T.Q4_K, 208, 512), normal(208, seed=1)
    factors = low_rank_factors(normal(208, 4, seed=2), normal(4, 512, seed=3))
    kept = product(made, 77, bias, factors)
    monkeypatch.setattr("fewstep.quant.numba_dequant.STREAMED", 0)
    assert torch.equal(product(made, 77, bias, factors), kept)


def test_nan_shows_and_stays_in_its_row():
    blocks, qtype, weight = matrix(T.Q6_K, 96, 256)
    blocks[7, 208:210] = torch.tensor([0xFF, 0x7F], dtype=torch.uint8)
    got = product((blocks, qtype, weight), 20)
    assert got.isnan().any(0).nonzero().flatten().tolist() == [7]


def test_what_is_left_to_others():
    assert product(matrix(T.Q8_0, 40, 64), 5) is None  # rows that fill no vector, and few of them
    blocks, qtype, _ = matrix(T.Q8_0, 96, 64)
    assert multiply_many(blocks[:, :-34], qtype, normal(5, 64), DTYPE) is None  # other rows
    assert multiply_many(blocks, T.F16, normal(5, 34), DTYPE) is None
    assert multiply_many(blocks, qtype, normal(5, 64), torch.float16) is None


def test_torchs_own_products_are_right_in_between():
    """Both may use AMX, on the same threads, each with shapes of its own."""
    made, x = matrix(T.Q6_K, 96, 256), normal(70, 1030).bfloat16()
    weights = [normal(rows, 1030, seed=rows).bfloat16() for rows in (40, 1000)]
    wanted = [torch.nn.functional.linear(x, w) for w in weights]
    first = product(made, 77)
    for _ in range(3):
        assert all(
            torch.equal(torch.nn.functional.linear(x, w), y)
            for w, y in zip(weights, wanted, strict=True)
        )
        assert torch.equal(product(made, 77), first)


def test_without_openmp_and_from_a_thread_of_ours_it_is_the_same(monkeypatch):
    made, bias = matrix(T.IQ3_S, 400, 512), normal(400, seed=1)
    factors = low_rank_factors(normal(400, 4, seed=2), normal(4, 512, seed=3))
    wanted = product(made, 77, bias, factors)
    inside = next(in_order(lambda _: product(made, 77, bias, factors), [None]))
    monkeypatch.setattr(threading, "_openmp", lambda: None)
    assert torch.equal(product(made, 77, bias, factors), wanted)
    assert torch.equal(inside, wanted)


def test_a_part_that_was_not_done_is_noticed(monkeypatch):
    @importlib.import_module("numba").njit
    def no_memory(told, first, end):
        raise MemoryError

    numba_linear = importlib.import_module("fewstep.quant.numba_linear")
    monkeypatch.setattr(numba_linear, "_multiply_rows", no_memory)
    with pytest.raises(MemoryError, match="close other programs"):
        product(matrix(T.Q8_0, 96, 64), 1)
