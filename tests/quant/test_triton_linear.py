"""The GPU's product of a packed matrix, in Triton's interpreter, against float64; and that Triton
can build it for a GPU, which needs none either.
"""

import importlib
import re

import pytest
import torch
from fewstep.quant import QTYPES
from fewstep.tests.quant.interpreted import builder, fixtures
from fewstep.tests.quant.test_linear import matrix, normal
from fewstep.tests.quant.test_triton import TYPES
from gguf import GGMLQuantizationType as T

triton = pytest.importorskip("triton")
NAMES = ("fewstep.quant.triton_linear", "fewstep.quant.triton_dequant")
# How far a rounding to the type may lie from a number: half a step, or, in bfloat16, a whole one:
# the interpreter cuts where a GPU rounds. float32 is rounded to nowhere.
ROUNDING = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-7}
ROWS = 40  # one program's rows and a part of another's

kernels, for_gpus = fixtures(*NAMES)


def three_blocks(qtype):
    """So many columns; where two blocks lie side by side, the last one has no neighbour."""
    return 3 * QTYPES[qtype].block_size


def excess(got, x, weight, bias):
    """The largest error, as a share of what the roundings allow: of each weight, of the result,
    and of float32's sums, whose every step errs by 2**-24 of what it has so far, at the most.
    """
    truth, sizes = x.double() @ weight.T + bias.double(), x.double().abs() @ weight.abs().T
    sizes = sizes + bias.double().abs()
    rounding = ROUNDING[x.dtype]
    allowed = rounding * (sizes + truth.abs()) + (x.shape[1] + 2) * 2**-24 * sizes
    return ((got.double() - truth).abs() / (allowed * (1 + rounding))).max().item()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)
def test_every_type_errs_no_more_than_its_roundings(kernels, qtype, dtype):
    blocks, _, weight = matrix(qtype, ROWS, three_blocks(qtype))
    x = (normal(7, weight.shape[1]) / 64).to(dtype)  # so that float16 holds the sums
    bias = normal(ROWS, seed=1).to(dtype)
    got = kernels.linear(blocks, qtype, x, bias)
    assert got.dtype == dtype and got.shape == (7, ROWS)
    assert excess(got, x, weight, bias) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vectors", [1, 16, 77, 130])  # one program's, and a part of another's
@pytest.mark.parametrize(("qtype", "rows"), [(T.Q4_0, 1), (T.Q4_K, 33), (T.Q8_0, 64)])
def test_any_number_of_vectors_and_rows(kernels, qtype, rows, vectors, dtype):
    blocks, _, weight = matrix(qtype, rows, three_blocks(qtype))
    x = normal(vectors, weight.shape[1]).to(dtype)
    assert excess(kernels.linear(blocks, qtype, x), x, weight, torch.zeros(rows)) < 1


def test_vectors_and_blocks_may_lie_anywhere(kernels):
    blocks, qtype, _ = matrix(T.Q6_K, ROWS, 256)
    odd = torch.empty(blocks.numel() + 1, dtype=torch.uint8)[1:].view_as(blocks).copy_(blocks)
    x = normal(256, 5).T
    got = kernels.linear(odd, qtype, x)
    assert torch.equal(got, kernels.linear(blocks, qtype, x.contiguous()))


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, at NaN
def test_nan_shows_and_stays_in_its_row(kernels):
    blocks, qtype, _ = matrix(T.Q6_K, ROWS, 256)
    blocks[7, 208:210] = torch.tensor([0xFF, 0x7F], dtype=torch.uint8)
    got = kernels.linear(blocks, qtype, normal(3, 256))
    assert got.isnan().any(0).nonzero().flatten().tolist() == [7]


def test_every_type_that_is_unpacked_is_multiplied(kernels):
    assert set(TYPES) == kernels.COMPILED


def build(kernels, qtype, M, gpu=("cuda", 80, 32)):
    """What Triton makes for a GPU of the product of M vectors, or of dequantising if M is 0."""
    built, dequant = builder(gpu), importlib.import_module(NAMES[1])
    if not M:
        return built.dequantize(dequant, qtype, gpu).asm
    return built.product(kernels, dequant, qtype, M, gpu).asm


@pytest.mark.parametrize("M", [0, 16])
@pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)
def test_a_gpus_compiler_takes_it(for_gpus, qtype, M):
    """What the interpreter allows, Triton's compiler need not: it makes a kernel for sm_80, which
    has registers enough.
    """
    made = build(for_gpus, qtype, M)
    assert ("mma.sync" in made["ptx"]) == bool(M)  # tensor cores multiply
    assert "STG" in made["sass"] and "STL" not in made["sass"]  # stores, but none of a spill


GPUS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx1100": ("hip", "gfx1100", 32),
}
PRODUCT = re.compile("mma.sync|wgmma.mma_async|v_wmma")


@pytest.mark.parametrize("M", [0, 16, 128])
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("qtype", [T.Q4_K, T.Q6_K], ids=lambda qtype: qtype.name)
def test_so_do_the_compilers_of_others(for_gpus, qtype, gpu, M):
    made = build(for_gpus, qtype, M, GPUS[gpu])
    code = made["amdgcn" if gpu == "gfx1100" else "ptx"]
    assert bool(PRODUCT.search(code)) == bool(M)


def test_another_number_of_vectors_or_blocks_builds_nothing_anew(for_gpus):
    dequant = importlib.import_module(NAMES[1])
    for kernel, free in ((for_gpus._linear, "vectors"), (dequant._dequantize, "n")):
        assert [p.name for p in kernel.params if p.do_not_specialize] == [free]
