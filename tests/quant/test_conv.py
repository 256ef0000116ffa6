"""Convolutions by the kernel, against float64."""

import pytest
import torch
from fewstep.quant import Convolution, convolves
from torch.nn.functional import conv2d

ERROR = 1e-5  # of the result, in the mean square
CLOSE = {"rtol": 1e-4, "atol": 1e-3}


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    if not convolves(torch.zeros(16, 16, 3, 3)):
        pytest.skip("no kernel for this CPU, or no numba")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(x, weight, bias=None):
    got = Convolution()(x, weight, bias)
    truth = conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    assert got.shape == truth.shape and got.is_contiguous(memory_format=torch.channels_last)
    return ((got - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("size", [(24, 24), (25, 31), (1, 130), (130, 3), (66, 64)])
@pytest.mark.parametrize(("channels", "outputs"), [(16, 16), (48, 64), (256, 16)])
def test_every_size(size, channels, outputs):
    x = normal(1, channels, *size)
    assert error(x, normal(outputs, channels, 3, 3, seed=1)) < ERROR


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pictures_with_a_bias_in_any_layout(layout):
    x = normal(3, 32, 21, 18).contiguous(memory_format=layout)
    weight = normal(48, 32, 3, 3, seed=1).contiguous(memory_format=layout)
    assert error(x, weight, normal(48, seed=2)) < ERROR
    assert error(x[:, :, 1:, ::2], weight) < ERROR


def test_the_error_does_not_grow_with_the_channels():
    assert error(normal(1, 1024, 24, 24), normal(16, 1024, 3, 3, seed=1)) < ERROR


def test_one_after_the_other_share_their_memory():
    convolution, x = Convolution(), normal(1, 32, 24, 24)
    for outputs in (16, 64, 32):
        weight = normal(outputs, 32, 3, 3, seed=outputs)
        torch.testing.assert_close(convolution(x, weight), conv2d(x, weight, padding=1), **CLOSE)
    assert convolution.kept.filters.numel() == 36 * 32 * 64


def test_more_threads_than_tiles():
    torch.set_num_threads(64)
    assert error(normal(1, 256, 24, 24), normal(256, 256, 3, 3, seed=1)) < ERROR


def test_in_inference_mode_and_after_it():
    convolution, x, weight = Convolution(), normal(1, 16, 24, 24), normal(16, 16, 3, 3, seed=1)
    with torch.inference_mode():
        first = convolution(x, weight)
    assert torch.equal(convolution(x, weight), first)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (normal(1, 16, 16, 16), normal(16, 16, 3, 3)),  # few tiles
        (normal(1, 8, 64, 64), normal(16, 8, 3, 3)),
        (normal(1, 16, 64, 64), normal(3, 16, 3, 3)),
        (normal(1, 16, 64, 64), normal(16, 16, 1, 1)),
        (normal(1, 16, 64, 64).double(), normal(16, 16, 3, 3)),
        (normal(1, 16, 64, 64).half(), normal(16, 16, 3, 3).half()),
        (normal(16, 64, 64), normal(16, 16, 3, 3)),
        (normal(1, 16, 64, 64), normal(16, 16, 3, 3).requires_grad_()),
        (normal(1, 32, 64, 64), normal(16, 16, 3, 3)),  # not of the weight's channels
        (normal(1, 0, 64, 64), normal(16, 0, 3, 3)),
    ],
)
def test_what_is_left_to_torch(x, weight):
    assert Convolution()(x, weight) is None


@pytest.mark.parametrize("bias", [normal(32), normal(16).double(), normal(16).requires_grad_()])
def test_a_bias_that_is_left_to_torch(bias):
    assert Convolution()(normal(1, 16, 64, 64), normal(16, 16, 3, 3), bias) is None


def test_in_a_process_that_computes_in_another_type_by_default():
    x, weight = normal(1, 16, 24, 24), normal(16, 16, 3, 3, seed=1)
    torch.set_default_dtype(torch.float64)
    try:
        assert error(x, weight) < ERROR
    finally:
        torch.set_default_dtype(torch.float32)
