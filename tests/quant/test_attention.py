"""The compiled attention against float64, and what it leaves to others."""

import importlib

import pytest
import torch
from fewstep.quant import attend
from torch.nn.functional import scaled_dot_product_attention

# bfloat16's rounding errs by at most 2**-9. q and k round the scores, which the softmax makes an
# error of the probabilities; these and v are rounded again.
ERROR = 2**-7


def tensors(pictures, tokens, keys, heads, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((pictures, n, heads, width) for n in (tokens, keys, keys))
    return [torch.randn(shape, generator=g) for shape in shapes]


def in_float64(*qkv):
    return scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in qkv)).transpose(1, 2)


@pytest.fixture(autouse=True)
def kernel():
    if attend(*tensors(1, 1, 1, 1, 64)) is None:
        pytest.skip("no kernel for this CPU, or no numba")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 64),
        (1, 7, 5, 2, 64),
        (2, 333, 333, 3, 64),
        (2, 6, 129, 3, 128),
        (1, 65, 1, 2, 192),
    ],
)
def test_error_is_that_of_bfloat16(shape, threads):
    qkv, before = tensors(*shape), torch.get_num_threads()
    torch.set_num_threads(threads)
    got = attend(*qkv)
    torch.set_num_threads(before)
    truth = in_float64(*qkv)
    assert got.shape == truth.shape and got.dtype == torch.float32
    assert ((got - truth).norm() / truth.norm()).item() < ERROR
    rounded = scaled_dot_product_attention(*(t.bfloat16().transpose(1, 2) for t in qkv))
    by_torch = (rounded.transpose(1, 2) - truth).norm()
    assert (got - truth).norm() <= 1.1 * by_torch  # no worse than torch's kernel


def test_long_rows_of_scores_are_left_to_torchs_amx():
    amx = importlib.import_module("fewstep.quant.numba_jit").AMX
    q, k, v = tensors(1, 4, 2**13, 1, 64)
    assert attend(q, k, v) is not None
    assert (attend(q, *(torch.cat((t, t[:, :1]), 1) for t in (k, v))) is None) == amx


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v = tensors(1, 40, 40, 1, 64)
    q, k = ((100 * t).bfloat16().float() for t in (q, k))
    got, truth = attend(q, k, v), in_float64(q, k, v)
    assert got.isfinite().all()
    scores = q[0, :, 0].double() @ k[0, :, 0].double().T
    sure = scores.topk(2).values.diff().abs().flatten() > 8 * 20  # one key has it all
    assert sure.sum() > 20
    torch.testing.assert_close(got[0, sure].double(), truth[0, sure], rtol=2**-8, atol=1e-6)


def test_nan_and_infinity_show():
    for place, value in ((0, "nan"), (1, "nan"), (2, "nan"), (2, "inf")):
        qkv = tensors(1, 40, 40, 1, 64)
        qkv[place][0, 3, 0, 5] = float(value)
        assert not attend(*qkv).isfinite().all()


def test_other_layouts_are_taken_too():
    qkv = tensors(2, 50, 70, 3, 64)
    want = attend(*qkv)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv]
    assert not apart[0].is_contiguous() and torch.equal(attend(*apart), want)


def test_what_is_left_to_torch():
    assert attend(*tensors(1, 4, 4, 2, 32)) is None  # narrow heads
    assert attend(*(t.bfloat16() for t in tensors(1, 4, 4, 2, 64))) is None
    q, k, v = tensors(1, 4, 4, 2, 64)
    assert attend(q, k[:, :, :1], v[:, :, :1]) is None  # shared keys


def test_is_one_operation_of_a_compiled_graph():
    """Transposed inputs too, as models have them."""
    qkv = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors(2, 9, 11, 3, 64)]
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*qkv), attend(*qkv))
    torch.library.opcheck(torch.ops.fewstep.attend.default, qkv)
