"""A few vectors times a quantised matrix: as exact as float32 sums are."""

import numpy as np
import pytest
import torch
from fewstep.quant import QTYPES, dequantize, multiply_few
from gguf import GGMLQuantizationType as T

pytest.importorskip("numba")
ROWS, COLUMNS = 300, 512


def matrix(qtype, seed=0):
    """Random blocks without the halves that are NaN or infinite."""
    rng, row = np.random.default_rng(seed), QTYPES[qtype]
    n = ROWS * COLUMNS // row.block_size
    blocks = torch.from_numpy(rng.integers(0, 64, (n, row.type_size), dtype=np.uint8))
    return blocks.reshape(ROWS, -1), dequantize(blocks, qtype, (ROWS, COLUMNS))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vectors", [1, 4])
@pytest.mark.parametrize("qtype", QTYPES, ids=lambda t: t.name)
def test_equals_the_product_in_float64(qtype, vectors, threads):
    """Sums of 512 products in lanes of 8 err by a few roundings of the sum of their sizes."""
    blocks, weight = matrix(qtype)
    x = torch.randn(vectors, COLUMNS, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got = multiply_few(blocks, qtype, x)
    torch.set_num_threads(before)
    truth, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert got.dtype == torch.float32 and got.shape == (vectors, ROWS)
    assert ((got - truth).abs() <= 16 * torch.finfo(torch.float32).eps * size).all()


def test_leaves_to_others_what_is_not_for_it():
    blocks, _ = matrix(T.Q6_K)
    assert multiply_few(blocks, T.Q6_K, torch.ones(5, COLUMNS)) is None  # too many
    assert multiply_few(blocks, T.Q6_K, torch.ones(1, COLUMNS - 256)) is None  # other rows
    blocks = torch.zeros(ROWS, 5 * 34, dtype=torch.uint8)
    assert multiply_few(blocks, T.Q8_0, torch.ones(1, 5 * 32)) is None  # half a vector is left
    assert multiply_few(blocks, T.F16, torch.ones(1, 5 * 17)) is None  # nothing to unpack


def test_nan_shows():
    blocks, _ = matrix(T.Q6_K)
    blocks[7, 208:210] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    got = multiply_few(blocks, T.Q6_K, torch.ones(1, COLUMNS))
    assert got.isnan().nonzero()[:, 1].tolist() == [7]
