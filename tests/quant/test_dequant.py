"""Every block format against gguf-py, on bytes that a quantiser would never write too."""

import importlib

import gguf
import numpy as np
import pytest
import torch
from fewstep.quant import QTYPES, GGUFError, dequantize, dequantize_rows

T = gguf.GGMLQuantizationType
EVERY_TYPE = pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
MORE_THAN_A_TILE = 2**19 + 2**10  # weights
MODULE = importlib.import_module("fewstep.quant.dequant")


@pytest.fixture(params=["numba", "torch"], autouse=True)
def formulation(request, monkeypatch):
    """Compiled kernels, and the torch formulation that stands in for them, in turn."""
    if request.param == "torch":
        monkeypatch.setattr(MODULE, "_kernels", lambda device: None)
    else:
        pytest.importorskip("numba")


def random_blocks(qtype, n, seed=0):
    """Random bytes hold every half-precision value, so also infinity, NaN and subnormals."""
    rng = np.random.default_rng([seed, qtype])
    return rng.integers(0, 256, (n, QTYPES[qtype].type_size), dtype=np.uint8)


def reference(blocks, qtype):
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks, qtype))


def assert_same_bits(got, want):
    """Equal bit for bit; of NaN only the places, as no arithmetic promises its payload."""
    assert got.dtype == want.dtype == torch.float32 and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(got[number].view(torch.int32), want[number].view(torch.int32))


@EVERY_TYPE
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_random_bytes_equal_gguf(qtype, rows):
    blocks = random_blocks(qtype, rows * 3, seed=rows)
    shape = (rows, 3 * QTYPES[qtype].block_size)
    want = reference(blocks.reshape(rows, -1), qtype)
    assert_same_bits(dequantize(torch.from_numpy(blocks), qtype, shape), want)


@EVERY_TYPE
def test_tiles_join_without_a_seam(qtype):
    size = QTYPES[qtype].block_size
    blocks = torch.from_numpy(random_blocks(qtype, MORE_THAN_A_TILE // size))
    whole = dequantize(blocks, qtype, (len(blocks), size))
    half = len(blocks) // 2
    parts = [dequantize(part, qtype, (len(part), size)) for part in (blocks[:half], blocks[half:])]
    assert_same_bits(whole, torch.cat(parts))


@EVERY_TYPE
@pytest.mark.parametrize("byte", [0x00, 0x7C, 0x80, 0xFF], ids=hex)
def test_uniform_bytes_equal_gguf(qtype, byte):
    blocks = np.full((2, QTYPES[qtype].type_size), byte, dtype=np.uint8)
    got = dequantize(torch.from_numpy(blocks), qtype, (2, QTYPES[qtype].block_size))
    assert_same_bits(got, reference(blocks, qtype))


@EVERY_TYPE
def test_each_bit_of_the_layout(qtype):
    """One bit flipped at a time: none of the layout goes untested."""
    size = QTYPES[qtype].type_size
    blocks = np.full((size, 8, size), 0x2C, dtype=np.uint8)
    place = np.arange(size)
    blocks[place, :, place] ^= 1 << np.arange(8, dtype=np.uint8)
    blocks = blocks.reshape(-1, size)
    got = dequantize(torch.from_numpy(blocks), qtype, (len(blocks), QTYPES[qtype].block_size))
    assert_same_bits(got, reference(blocks, qtype))


@EVERY_TYPE
def test_blocks_are_independent(qtype):
    blocks = torch.from_numpy(random_blocks(qtype, 9))
    size = QTYPES[qtype].block_size
    whole = dequantize(blocks, qtype, (9, size))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_same_bits(dequantize(blocks[order], qtype, (9, size)), whole[order])
    assert_same_bits(dequantize(blocks[4], qtype, (size,)), whole[4])


@EVERY_TYPE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_round_once(qtype, dtype):
    blocks = torch.from_numpy(random_blocks(qtype, 50))
    shape = (50, QTYPES[qtype].block_size)
    got = dequantize(blocks, qtype, shape, dtype)
    want = dequantize(blocks, qtype, shape).to(dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_numbers_that_are_subnormal_in_float32_are_not_lost():
    """MXFP4 has some, and instructions that round to bfloat16 make zeros of them."""
    blocks = torch.from_numpy(random_blocks(T.MXFP4, 256))
    blocks[:, 0] = torch.arange(256)
    want = dequantize(blocks, T.MXFP4, (256, 32))
    assert (want[want != 0].abs() < torch.finfo(torch.float32).tiny).any()
    got = dequantize(blocks, T.MXFP4, (256, 32), torch.bfloat16)
    torch.testing.assert_close(got, want.bfloat16(), rtol=0, atol=0, equal_nan=True)


@EVERY_TYPE
def test_bytes_may_start_anywhere_and_skip(qtype):
    blocks = torch.from_numpy(random_blocks(qtype, 6))
    shape = (6, QTYPES[qtype].block_size)
    want = dequantize(blocks, qtype, shape)
    odd = torch.cat((torch.zeros(1, dtype=torch.uint8), blocks.flatten()))[1:]
    assert_same_bits(dequantize(odd, qtype, shape), want)
    every_other = torch.stack((blocks, blocks), 1)[:, 0]
    assert not every_other.is_contiguous()
    assert_same_bits(dequantize(every_other, qtype, shape), want)


@EVERY_TYPE
def test_input_is_left_as_it_was(qtype):
    blocks = torch.from_numpy(random_blocks(qtype, 3))
    before = blocks.clone()
    dequantize(blocks, qtype, (3, QTYPES[qtype].block_size))
    assert torch.equal(blocks, before)


@EVERY_TYPE
def test_out_takes_the_result(qtype):
    blocks = torch.from_numpy(random_blocks(qtype, 4))
    shape = (2, 2 * QTYPES[qtype].block_size)
    out = torch.full(shape, 7, dtype=torch.float16)
    assert dequantize(blocks, qtype, shape, out=out) is out
    torch.testing.assert_close(
        out, dequantize(blocks, qtype, shape, torch.float16), rtol=0, atol=0, equal_nan=True
    )


@EVERY_TYPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formulation", ["numba"], indirect=True)
def test_what_goes_past_the_cache_is_the_same(qtype, dtype, monkeypatch):
    kernels = importlib.import_module("fewstep.quant.numba_dequant")
    blocks = torch.from_numpy(random_blocks(qtype, 3))
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    room = torch.zeros(5, QTYPES[qtype].block_size, dtype=dtype)
    kept = torch.empty_like(room[1:4])
    kernels.unpack(blocks, qtype, kept)
    monkeypatch.setattr(kernels, "STREAMED", 0)
    for start in (0, 1):  # of a line of the cache or not
        room.fill_(7)
        out = room.view(-1)[room.shape[1] + start :][: kept.numel()].view_as(kept)
        assert bool(out.data_ptr() % 64) == bool(start)
        kernels.unpack(blocks, qtype, out)
        assert torch.equal(out.view(bits), kept.view(bits))
        assert room.view(-1)[: room.shape[1] + start].eq(7).all()
        assert room.view(-1)[room.shape[1] + start + kept.numel() :].eq(7).all()


@EVERY_TYPE
def test_rows_are_those_of_the_whole(qtype):
    length = 2 * QTYPES[qtype].block_size
    blocks = torch.from_numpy(random_blocks(qtype, 10)).view(5, -1)
    whole = dequantize(blocks, qtype, (5, length))
    rows = torch.tensor([[4, 0, 4], [1, 2, 3]])
    assert_same_bits(dequantize_rows(blocks, qtype, length, rows), whole[rows])
    assert dequantize_rows(blocks, qtype, length, rows[:0]).shape == (0, 3, length)


def test_rows_touch_only_the_rows_asked_for():
    blocks = torch.zeros(4, 34, dtype=torch.uint8)
    blocks[0, 0:2] = torch.tensor([0x00, 0x7E])  # a NaN for a scale
    assert not dequantize_rows(blocks, T.Q8_0, 32, torch.tensor([1, 3])).isnan().any()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F64", torch.float64),
        ("I8", torch.int8),
        ("I16", torch.int16),
        ("I32", torch.int32),
        ("I64", torch.int64),
    ],
)
def test_plain_types_pass_through(name, dtype):
    qtype = T[name]
    values = torch.arange(-6, 6).to(dtype).view(3, 4)
    blocks = values.view(torch.uint8)
    assert torch.equal(dequantize(blocks, qtype, (3, 4), dtype), values)
    assert torch.equal(dequantize(blocks, qtype, (3, 4)), values.float())
    assert torch.equal(dequantize_rows(blocks, qtype, 4, torch.tensor([2])), values[2:].float())


def test_bfloat16_equals_gguf_on_every_bit_pattern():
    blocks = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    got = dequantize(torch.from_numpy(blocks), T.BF16, (2**16,))
    assert_same_bits(got, reference(blocks, T.BF16))


def test_float16_equals_gguf_on_every_bit_pattern():
    blocks = np.arange(2**16, dtype=np.uint16).view(np.uint8)
    got = dequantize(torch.from_numpy(blocks), T.F16, (2**16,))
    assert_same_bits(got, reference(blocks, T.F16))


def test_empty_weight():
    empty = torch.empty(0, dtype=torch.uint8)
    assert dequantize(empty, T.Q4_K, (0, 256)).shape == (0, 256)
    assert dequantize(empty, T.F32, (3, 0)).shape == (3, 0)


def test_rows_need_not_be_whole_blocks():
    """City96's files store a convolution of few columns folded into rows of 256."""
    blocks = torch.from_numpy(random_blocks(T.Q6_K, 2))
    flat = dequantize(blocks, T.Q6_K, (512,))
    assert_same_bits(dequantize(blocks, T.Q6_K, (8, 64)), flat.view(8, 64))


@pytest.mark.parametrize(
    ("blocks", "qtype", "shape", "message"),
    [
        (torch.zeros(209, dtype=torch.uint8), T.Q6_K, (256,), "takes 210 bytes, not 209"),
        (torch.zeros(210, dtype=torch.uint8), T.Q6_K, (255,), "does not divide"),
        (torch.zeros(210), T.Q6_K, (256,), "uint8, not torch.float32"),
        (torch.zeros(8, dtype=torch.uint8), T.F32, (3,), "takes 12 bytes, not 8"),
        (torch.zeros(40, dtype=torch.uint8), T.Q8_1, (32,), r"Q8_1, .*known: F32, .*NVFP4"),
        (torch.zeros(18, dtype=torch.uint8), 31, (32,), "Q4_0_4_4, which ggml has removed"),
        (torch.zeros(18, dtype=torch.uint8), 999, (32,), "type 999 is unknown"),
    ],
)
def test_bad_input_is_told(blocks, qtype, shape, message):
    with pytest.raises(GGUFError, match=message):
        dequantize(blocks, qtype, shape)


def test_bad_out_and_bad_rows_are_told():
    blocks = torch.zeros(2, 34, dtype=torch.uint8)
    with pytest.raises(GGUFError, match="`out`"):
        dequantize(blocks, T.Q8_0, (2, 32), out=torch.empty(32, 2).t())
    with pytest.raises(GGUFError, match="2-D"):
        dequantize_rows(blocks.flatten(), T.Q8_0, 32, torch.tensor([0]))
    with pytest.raises(GGUFError, match="takes 68 bytes, not 34"):
        dequantize_rows(blocks, T.Q8_0, 64, torch.tensor([0]))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("qtype", [T.Q6_K, T.IQ2_XXS])
def test_traces_as_one_graph(qtype):
    """torch.compile breaks no graph; `eager` runs the captured graph as it is."""
    blocks = torch.from_numpy(random_blocks(qtype, 5))
    shape = (5, QTYPES[qtype].block_size)
    want = dequantize(blocks, qtype, shape)
    compiled = torch.compile(dequantize, backend="eager", fullgraph=True)
    assert_same_bits(compiled(blocks, qtype, shape), want)


def test_kernels_that_many_threads_ask_for_first_have_one_name():
    native = pytest.importorskip("fewstep.quant.numba_native")
    name = native._take_parts.__qualname__
    native._taking.__wrapped__()
    assert native._take_parts.__qualname__ == name


@pytest.mark.parametrize("formulation", ["numba"], indirect=True)
def test_an_error_in_a_kernel_is_noticed(monkeypatch, formulation):
    kernels = importlib.import_module("fewstep.quant.numba_dequant")
    numba = importlib.import_module("numba")

    @numba.njit
    def no_memory(data, out):
        raise MemoryError

    monkeypatch.setattr(kernels.numba_blocks, "q2_k", no_memory)
    monkeypatch.setattr(kernels, "native_kernel", kernels.native_kernel.__wrapped__)
    blocks, out = torch.zeros(4, 84, dtype=torch.uint8), torch.zeros(4, 256)
    with pytest.raises(MemoryError, match="close other programs"):
        kernels.unpack(blocks, T.Q2_K, out)
