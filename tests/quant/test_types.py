"""The table of types holds all that gguf-py can unpack, and says so in the README's words."""

import gguf
import numpy as np
import pytest
from fewstep.quant import PLAIN_TYPES, QTYPES, GGUFError, types_markdown
from fewstep.quant.types import find_type

T = gguf.GGMLQuantizationType


def can_unpack(qtype):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8), qtype)
    except NotImplementedError:
        return False
    return True


def test_every_type_that_gguf_unpacks_is_known():
    known = set(QTYPES) | set(PLAIN_TYPES)
    assert {qtype for qtype in T if can_unpack(qtype)} <= known


def test_quantised_and_plain_types_are_apart():
    assert not set(QTYPES) & set(PLAIN_TYPES)


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda qtype: qtype.name)
def test_sizes_are_ggufs(qtype):
    row = QTYPES[qtype]
    assert (row.block_size, row.type_size) == gguf.GGML_QUANT_SIZES[qtype]
    assert row.qtype is qtype


@pytest.mark.parametrize("qtype", PLAIN_TYPES, ids=lambda qtype: qtype.name)
def test_plain_dtypes_have_ggufs_size(qtype):
    assert (1, PLAIN_TYPES[qtype].itemsize) == gguf.GGML_QUANT_SIZES[qtype]


def test_bits_per_weight():
    assert QTYPES[T.Q6_K].bits_per_weight == 6.5625  # ggml's published figure


def test_find_type_knows_numbers():
    assert find_type(14) is T.Q6_K
    for number in (31, 9, 77, 2**32 - 1):
        with pytest.raises(GGUFError, match=r"known: F32, F16, BF16, .*Q6_K.*NVFP4"):
            find_type(number)


def test_markdown_lists_every_type():
    lines = types_markdown().splitlines()
    assert {len(line.split("|")) for line in lines} == {7}
    text = "\n".join(lines)
    for qtype in (*QTYPES, *PLAIN_TYPES):
        assert qtype.name in text
    assert "| Q6_K | 6.562 | 256 |" in text
