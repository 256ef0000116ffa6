"""Every type that can be written against ggml's C (tests/golden), and what must hold of any."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from fewstep import quant
from fewstep.quant import QTYPES, GGUFError, dequantize, writable_types
from fewstep.tests.quant.elsewhere import Elsewhere

T = gguf.GGMLQuantizationType
GOLDEN = Path(__file__).parents[1] / "golden" / "quantize.npz"
codebook = importlib.import_module("fewstep.quant.codebook")
NEED_IMPORTANCE, CODEBOOKS = codebook.NEED_IMPORTANCE, sorted(codebook.SEARCHES)
PLAIN = [T.F32, T.F16, T.BF16]
BLOCKS = [qtype for qtype in writable_types() if qtype in QTYPES]
EVERY_BLOCK = pytest.mark.parametrize("qtype", BLOCKS, ids=lambda qtype: qtype.name)
EVERY_TYPE = pytest.mark.parametrize("qtype", writable_types(), ids=lambda qtype: qtype.name)


effort = importlib.import_module("fewstep.quant.effort")
MODULE = importlib.import_module("fewstep.quant.quantize")  # fewstep.quant.quantize is the function


def quantize(x, qtype, importance=None, effort="ggml"):
    """An even importance where ggml demands one."""
    if importance is None and qtype in NEED_IMPORTANCE and x.dim() == 2:
        importance = torch.ones(x.shape[1])
    return quant.quantize(x, qtype, importance, effort)


@pytest.fixture(params=["numba", "torch"])
def formulation(request, monkeypatch):
    """The compiled kernels, which are optional, and what stands in for them."""
    if request.param == "torch":
        monkeypatch.setattr(MODULE, "_kernels", lambda: None)
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def gaussian(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative_error(x, qtype, importance=None):
    """Root mean square error over root mean square weight."""
    back = dequantize(quantize(x, qtype, importance), qtype, x.shape)
    return float((back - x).norm() / x.norm())


def different_kinds(got, want, kinds, type_size):
    """Which rows differ, and in how many blocks."""
    counts = (got != want).reshape(len(kinds), -1, type_size).any(2).sum(1)
    return {str(kind): int(count) for kind, count in zip(kinds, counts, strict=True) if count}


def test_golden_holds_every_type(golden):
    assert {key.split("/")[0] for key in golden if "/" in key} - {"importance"} == {
        qtype.name for qtype in BLOCKS
    }


@pytest.mark.parametrize(
    ("qtype", "name"),
    [
        pytest.param(qtype, name, id=f"{qtype.name}-{name}")
        for qtype in BLOCKS
        for name in ("none", "skewed", "gaps")
        if name != "none" or qtype not in NEED_IMPORTANCE  # ggml demands one
    ],
)
def test_bytes_equal_ggml(formulation, golden, qtype, name):
    """All of them: ggml's arithmetic has no fused product on x86, and ours none anywhere."""
    rows = golden[f"{qtype.name}/rows"]
    x = torch.from_numpy(golden["x"])
    importance = None if name == "none" else torch.from_numpy(golden[f"importance/{name}"])
    got = quantize(x[torch.from_numpy(rows)], qtype, importance)
    want = golden[f"{qtype.name}/{name}"]
    type_size = QTYPES[qtype].type_size
    assert different_kinds(got.numpy(), want, golden["kinds"][rows], type_size) == {}

    size = QTYPES[qtype].block_size
    part = None if importance is None else importance[:size]
    one_block = quantize(x[:1, :size], qtype, part)
    assert one_block.numpy().tobytes() == golden[f"{qtype.name}/{name}/one block"].tobytes()


GPU = torch.device("cuda", 99)  # none that there is: tables are kept for each device
MPS = torch.device("mps")


@EVERY_BLOCK
@pytest.mark.parametrize(
    "mode", [Elsewhere(GPU), Elsewhere(MPS, float64=False)], ids=lambda mode: mode.device.type
)
def test_any_device_writes_the_same_bytes(qtype, mode):
    """And mixes no tensor of the CPU in. Half of the weights are zero, as some quotients then."""
    x, importance = gaussian(2, 256, seed=int(qtype)), torch.rand(256)
    x[1] = 0
    for given in [importance] + [None] * (qtype not in NEED_IMPORTANCE):
        for name in effort.EFFORTS if qtype in effort.TYPES else effort.EFFORTS[:1]:
            want = quant.quantize(x, qtype, given, name)
            with mode:
                moved = None if given is None else given.to(mode.device)
                got = quant.quantize(x.to(mode.device), qtype, moved, name)
                assert got.device == mode.device
                got = got.cpu()
            assert torch.equal(got, want)


def test_the_device_that_is_none_refuses_what_a_gpu_would():
    with Elsewhere(GPU):
        there, here = torch.zeros(3, device=GPU), torch.ones(3)
        assert (there + 1).device == GPU and (there + torch.tensor(1.0)).cpu().is_cpu
        for mixed in (lambda: there + here, lambda: here.add_(there), there.numpy):
            with pytest.raises(RuntimeError, match="cuda:99"):
                mixed()
    with Elsewhere(MPS, float64=False):
        there = torch.zeros(3, device=MPS)
        with pytest.raises(RuntimeError, match="mps has no float64"):
            there.double()


@EVERY_BLOCK
@pytest.mark.parametrize("weighted", [False, True])
def test_kernels_equal_the_torch_formulation(qtype, weighted, monkeypatch):
    """On more than the golden rows; all there is of numba is compared here."""
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(int(qtype))
    x = torch.randn(19, 512, generator=generator) * torch.rand(19, 512, generator=generator) ** 9
    importance = torch.rand(512, generator=generator) ** 4 if weighted else None
    compiled = quantize(x, qtype, importance)
    monkeypatch.setattr(MODULE, "_kernels", lambda: None)
    assert torch.equal(quantize(x, qtype, importance), compiled)


@EVERY_BLOCK
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_independent(qtype, weighted):
    x = gaussian(7, 512)
    importance = torch.rand(512) if weighted else None
    whole = quantize(x, qtype, importance)
    assert torch.equal(quantize(x.flip(0), qtype, importance), whole.flip(0))
    assert torch.equal(quantize(x[3:4], qtype, importance), whole[3:4])


@EVERY_BLOCK
def test_blocks_are_independent(qtype):
    row = QTYPES[qtype]
    x = gaussian(3, 512)
    whole = quantize(x, qtype).view(-1, row.type_size)
    flipped = quantize(x.view(-1, row.block_size).flip(0), qtype)
    assert torch.equal(flipped.flip(0), whole)


@EVERY_BLOCK
def test_tiles_join_without_a_seam(qtype, monkeypatch):
    """More rows than a tile holds, a row longer than a tile, and a thread's uneven share."""
    monkeypatch.setattr(MODULE, "_TILE", 2**16)
    x = gaussian(1, 3 * 2**16 + 2**11 + 256)
    whole = quantize(x, qtype)
    assert torch.equal(quantize(x.view(-1, 256), qtype).view(1, -1), whole)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(quantize(x, qtype), whole)
    importance = torch.rand(256)
    rows = quantize(x.view(-1, 256), qtype, importance)
    assert torch.equal(quantize(x.view(-1, 256)[5:9], qtype, importance), rows[5:9])


@EVERY_TYPE
def test_strided_input_and_no_rows(qtype):
    x = gaussian(512, 6)
    assert torch.equal(quantize(x.t(), qtype), quantize(x.t().contiguous(), qtype))
    assert quantize(torch.zeros(0, 512), qtype).shape[0] == 0
    before = x.clone()
    quantize(x.t(), qtype)
    assert torch.equal(x, before)


@EVERY_TYPE
def test_error_is_that_of_the_bits(qtype):
    """Bounds: a tenth above what ggml loses on Gaussian weights; a swapped nibble is far off."""
    bound = {
        "F32": 0, "F16": 2.3e-4, "BF16": 1.8e-3, "Q8_0": 0.0059, "Q6_K": 0.02, "Q5_K": 0.04,
        "Q5_1": 0.042, "Q5_0": 0.047, "Q4_K": 0.079, "Q4_1": 0.087, "Q4_0": 0.095,
        "IQ4_NL": 0.084, "IQ4_XS": 0.085, "MXFP4": 0.13, "Q3_K": 0.17, "Q2_K": 0.34,
        "NVFP4": 0.11, "TQ1_0": 0.9, "TQ2_0": 0.9, "IQ3_S": 0.182, "IQ3_XXS": 0.232,
        "IQ2_S": 0.293, "IQ2_XS": 0.332, "IQ2_XXS": 0.381, "IQ1_M": 0.643, "IQ1_S": 0.534,
    }  # fmt: skip
    assert relative_error(gaussian(16, 1024), qtype) <= bound[qtype.name]


def test_error_falls_with_the_bits():
    x = gaussian(16, 1024)
    ladder = [T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.Q8_0, T.F16, T.F32]
    errors = [relative_error(x, qtype) for qtype in ladder]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


@pytest.mark.parametrize("qtype", [T.Q4_0, T.Q5_0, T.Q8_0, T.Q6_K, T.MXFP4, *PLAIN])
def test_values_on_the_grid_come_back(qtype):
    """Whole numbers of a power of two, with the number of the grid's end among them."""
    end = {T.Q4_0: -8, T.Q5_0: -16, T.Q8_0: 127, T.Q6_K: -32, T.MXFP4: 6}.get(qtype, 7)
    x = torch.randint(-3, 4, (4, 512), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::16] = end
    x *= 0.125
    assert torch.equal(dequantize(quantize(x, qtype), qtype, x.shape), x)


@EVERY_BLOCK
def test_a_second_time_changes_little(qtype):
    """What was read back and is written again loses next to nothing more."""
    x = gaussian(8, 512)
    once = dequantize(quantize(x, qtype), qtype, x.shape)
    twice = dequantize(quantize(once, qtype), qtype, x.shape)
    assert (twice - once).norm() <= 0.5 * (once - x).norm()


@EVERY_TYPE
def test_zeros_stay_zero(qtype):
    x = torch.zeros(2, 512)
    for importance in (None, torch.ones(512), torch.zeros(512)):
        assert not dequantize(quantize(x, qtype, importance), qtype, x.shape).any()


UNWEIGHTED = [T.Q8_0, T.MXFP4, T.NVFP4, T.TQ1_0, T.TQ2_0]
WEIGHTED = [qtype for qtype in BLOCKS if qtype not in UNWEIGHTED]


@pytest.mark.parametrize("qtype", WEIGHTED, ids=lambda qtype: qtype.name)
def test_importance_lowers_the_error_where_it_lies(qtype):
    x, importance = gaussian(64, 512), torch.full((512,), 1e-3)
    importance[::8] = 1.0

    def error(weighing):
        back = dequantize(quantize(x, qtype, weighing), qtype, x.shape)
        return float((importance * (back - x).square()).sum())

    assert error(importance) < error(None)


@pytest.mark.parametrize("qtype", [*UNWEIGHTED, *PLAIN])
def test_importance_is_passed_over_where_nothing_is_weighed(qtype):
    x = gaussian(4, 512)
    assert torch.equal(quantize(x, qtype, torch.rand(512)), quantize(x, qtype))


@pytest.mark.parametrize("qtype", PLAIN)
def test_plain_types_are_rounded_casts(qtype):
    x = gaussian(3, 10)
    back = dequantize(quantize(x, qtype), qtype, x.shape)
    assert torch.equal(back, dequantize(quantize(back, qtype), qtype, x.shape))
    if qtype != T.BF16:  # gguf-py's BF16 rounds alike, and is compared where it is exact
        want = gguf.quants.quantize(x.numpy(), qtype).view(np.uint8)
        assert quantize(x, qtype).numpy().tobytes() == want.tobytes()


def test_without_numba_there_is_the_torch_formulation(monkeypatch, caplog):
    x = gaussian(4, 256)
    want = quantize(x, T.Q4_K)
    MODULE._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "fewstep.quant.numba_quantize", None)  # as if not to be found
    with caplog.at_level("INFO"):
        assert torch.equal(quantize(x, T.Q4_K), want)
    assert "without numba" in caplog.text
    monkeypatch.undo()
    MODULE._kernels.cache_clear()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@EVERY_TYPE
def test_nan_and_infinity_are_named(qtype, bad):
    x = gaussian(3, 512)
    x[1, 77] = bad
    with pytest.raises(GGUFError, match=rf"1 of 1536 weights.*{bad}, at \(1, 77\): {qtype.name}"):
        quantize(x, qtype)


@pytest.mark.parametrize(
    ("x", "qtype", "message"),
    [
        (torch.zeros(2, 255), T.Q6_K, "256 weights a block, which does not divide rows of 255"),
        (torch.zeros(2, 33), T.Q8_0, "32 weights a block, which does not divide rows of 33"),
        (torch.zeros(512), T.Q8_0, r"float32, not torch.float32 of shape \(512,\)"),
        (torch.zeros(2, 2, 32), T.Q8_0, r"\(rows, cols\) float32, not .*\(2, 2, 32\)"),
        (torch.zeros(2, 32, dtype=torch.float16), T.Q8_0, "not torch.float16"),
        (torch.zeros(2, 32, dtype=torch.float64), T.F32, "not torch.float64"),
        (torch.zeros(2, 256), T.I32, r"I32 can be read but not written \(writable: F32, F16, .*"),
        (torch.zeros(2, 256), 999, "type 999 is unknown"),
    ],
)
def test_bad_weights_are_told(x, qtype, message):
    with pytest.raises(GGUFError, match=message):
        quantize(x, qtype)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(511), r"shape \(512,\).*not torch.float32 of shape \(511,\)"),
        (torch.ones(2, 512), r"shape \(512,\).*shape \(2, 512\)"),
        (torch.ones(512, dtype=torch.float64), "not torch.float64"),
        (torch.ones(512).index_fill(0, torch.tensor(5), -1.0), "negative, NaN or infinite"),
        (torch.ones(512).index_fill(0, torch.tensor(5), torch.nan), "negative, NaN or infinite"),
    ],
)
def test_bad_importance_is_told(importance, message):
    for qtype in (T.Q4_K, T.Q8_0, T.F16):
        with pytest.raises(GGUFError, match=message):
            quantize(torch.zeros(2, 512), qtype, importance)


def test_a_type_that_can_only_be_read_is_told(monkeypatch):
    monkeypatch.setitem(QTYPES, T.Q4_0, replace(QTYPES[T.Q4_0], quantize_blocks=None))
    with pytest.raises(GGUFError, match=r"Q4_0 can be read .*writable: .*Q8_0.*Q2_K"):
        quantize(torch.zeros(2, 256), T.Q4_0)


HIGH = pytest.mark.parametrize("qtype", sorted(effort.TYPES), ids=lambda qtype: qtype.name)


def weighted_error(x, qtype, importance, effort):
    back = dequantize(quantize(x, qtype, importance, effort), qtype, x.shape)
    return float(((back - x).square() * (1 if importance is None else importance)).sum())


@HIGH
@pytest.mark.parametrize("weighted", [False, True])
def test_high_effort_loses_less(formulation, qtype, weighted):
    """Of what is weighed, and in a file that says nothing of it. How much less: bench/effort.py."""
    x = gaussian(5, 512)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(0)) if weighted else None
    errors = [weighted_error(x, qtype, importance, effort) for effort in ("high", "ggml")]
    assert errors[0] < errors[1]


@HIGH
@pytest.mark.parametrize("weighted", [False, True])
def test_high_effort_is_one_search_in_two_formulations(qtype, weighted, monkeypatch):
    """Hostile weights too: an odd number of super-blocks, zeros, outliers, what overflows."""
    pytest.importorskip("numba")
    x = gaussian(9, 256)
    x[1] = 0
    x[2, 40:] = 0
    x[3, ::97] *= 1000
    x[4] *= 1e30
    x[5] *= 1e-30
    x[6] = x[6].abs()
    importance = torch.rand(256, generator=torch.Generator().manual_seed(0)) if weighted else None
    if weighted:
        importance[32:80] = 0
    compiled = quantize(x, qtype, importance, "high")
    monkeypatch.setattr(MODULE, "_kernels", lambda: None)
    assert torch.equal(quantize(x, qtype, importance, "high"), compiled)


@HIGH
def test_high_effort_keeps_zeros_and_the_sum_of_tiles(qtype, monkeypatch):
    zeros = torch.zeros(2, 512)
    for importance in (None, torch.ones(512), torch.zeros(512)):
        blocks = quantize(zeros, qtype, importance, "high")
        assert not dequantize(blocks, qtype, zeros.shape).any()
    x = gaussian(1, 3 * 2**14 + 256)
    whole = quantize(x, qtype, None, "high")
    monkeypatch.setattr(MODULE, "_TILE", 2**14)
    assert torch.equal(quantize(x, qtype, None, "high"), whole)


def test_effort_elsewhere():
    x = gaussian(2, 512)
    assert torch.equal(quantize(x, T.Q8_0, None, "high"), quantize(x, T.Q8_0))
    with pytest.raises(GGUFError, match=r"effort 'low' is unknown \(known: ggml, high\)"):
        quantize(x, T.Q4_K, None, "low")


@pytest.mark.parametrize("qtype", sorted(NEED_IMPORTANCE), ids=lambda qtype: qtype.name)
def test_an_importance_is_demanded_as_in_ggml(qtype):
    with pytest.raises(GGUFError, match=f"{qtype.name} needs an importance"):
        quant.quantize(torch.zeros(2, 512), qtype)


@pytest.mark.parametrize("qtype", CODEBOOKS, ids=lambda qtype: qtype.name)
def test_zeros_leave_their_neighbours_in_place(qtype):
    """32 zeros amid others, which ggml's IQ3_S stumbles over."""
    x = gaussian(1, 256)
    x[0, 64:96] = 0
    back = dequantize(quantize(x, qtype), qtype, x.shape)
    assert (back - x).norm() <= 0.5 * x.norm() and back[0, 64:96].abs().max() < 0.01


@pytest.mark.parametrize("qtype", [*CODEBOOKS, T.IQ1_S, T.IQ1_M], ids=lambda qtype: qtype.name)
def test_huge_weights_do_not_stop_a_codebook(formulation, qtype):
    """Errors overflow, and ggml aborts; what is written can be read."""
    x = gaussian(2, 256) * 1e38
    assert dequantize(quantize(x, qtype), qtype, x.shape).shape == x.shape


@EVERY_TYPE
def test_takes_the_result_where_it_is_told_to(qtype):
    x = torch.randn(3, 512)
    importance = torch.ones(512)
    expected = quant.quantize(x, qtype, importance)
    room = torch.zeros(5, expected.shape[1], dtype=torch.uint8)
    made = quant.quantize(x, qtype, importance, out=room[1:4])
    assert made.data_ptr() == room[1].data_ptr()
    assert torch.equal(room[1:4], expected) and not room[[0, 4]].any()
    with pytest.raises(GGUFError, match="`out` is not contiguous"):
        quant.quantize(x, qtype, importance, out=room[:, 1:])
