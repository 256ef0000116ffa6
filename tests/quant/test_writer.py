"""What is written is read again, by us and by gguf-py; what fails leaves nothing behind."""

import os

import gguf
import numpy as np
import pytest
import torch
from fewstep.quant import PLAIN_TYPES, QTYPES, GGUFError, GGUFFile, dequantize, write_gguf

T = gguf.GGMLQuantizationType
V = gguf.GGUFValueType
METADATA = {
    "text": "läuft",
    "nothing": "",
    "yes": True,
    "count": 4_000_000_000,
    "negative": -3,
    "long": 2**40,
    "real": 0.1,
    "sigmas": [1.0, 0.75, 0.0],
    "words": ["a", "", "ü"],
    "flags": (True, False),
    "numbers": [1, -2],
    "long numbers": [1, 2**40],
    "byte": np.uint8(7),
    "exact": np.float64(0.1),
    "bytes": np.array([1, 2, 255], np.uint8),
}


def random_blocks(qtype, rows, row_blocks):
    generator = torch.Generator().manual_seed(int(qtype))
    size = QTYPES[qtype].type_size * row_blocks
    return torch.randint(0, 256, (rows, size), dtype=torch.uint8, generator=generator)


def test_metadata_comes_back(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, "sd3", METADATA, [])
    got = dict(GGUFFile(path).metadata)
    assert got.pop("general.architecture") == "sd3"
    assert got.pop("real") == float(np.float32(0.1))
    want = dict(METADATA, flags=[True, False], bytes=[1, 2, 255])
    del want["real"]
    assert got == want


def test_metadata_has_the_documented_types(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, "sd3", METADATA, [])
    fields = {name: field.types for name, field in gguf.GGUFReader(path).fields.items()}
    want = {
        "text": [V.STRING],
        "nothing": [V.STRING],
        "yes": [V.BOOL],
        "count": [V.UINT32],
        "negative": [V.INT32],
        "long": [V.INT64],
        "real": [V.FLOAT32],
        "sigmas": [V.ARRAY, V.FLOAT32],
        "words": [V.ARRAY, V.STRING],
        "flags": [V.ARRAY, V.BOOL],
        "numbers": [V.ARRAY, V.INT32],
        "long numbers": [V.ARRAY, V.INT64],
        "byte": [V.UINT8],
        "exact": [V.FLOAT64],
        "bytes": [V.ARRAY, V.UINT8],
    }
    assert {name: fields[name] for name in want} == want


def test_plain_tensors_come_back(tmp_path):
    path = tmp_path / "a.gguf"
    shapes = [(3, 5), (7,), (), (2, 0), (2, 3, 1, 2)]
    tensors = {
        f"{qtype.name} {shape}": torch.randn(shape).mul(9).to(dtype)
        for qtype, dtype in PLAIN_TYPES.items()
        for shape in shapes
    }
    write_gguf(path, "sd3", {}, tensors.items())
    file = GGUFFile(path)
    assert list(file.tensors) == list(tensors)
    for name, tensor in tensors.items():
        got = file.tensor(name)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)
    assert "general.quantization_version" not in file.metadata


def test_quantised_tensors_come_back_and_gguf_agrees(tmp_path):
    path = tmp_path / "a.gguf"
    blocks = {qtype: random_blocks(qtype, 3, 2) for qtype in QTYPES}
    shapes = {qtype: (3, 2 * row.block_size) for qtype, row in QTYPES.items()}
    write_gguf(path, "flux", {}, [(t.name, (data, t, shapes[t])) for t, data in blocks.items()])
    file = GGUFFile(path)
    assert file.metadata["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    for theirs in gguf.GGUFReader(path).tensors:
        qtype = theirs.tensor_type
        info = file.tensors[theirs.name]
        assert (info.qtype, info.shape) == (qtype, shapes[qtype])
        assert torch.equal(file.blocks(theirs.name), blocks[qtype])
        assert np.array_equal(theirs.data, blocks[qtype].numpy())
        assert tuple(theirs.shape) == shapes[qtype][::-1]


def test_any_strides_are_written_in_order(tmp_path):
    path = tmp_path / "a.gguf"
    tensor = torch.arange(12.0).view(3, 4).t()
    parameter = torch.nn.Parameter(torch.ones(2))
    write_gguf(path, "sd3", {}, [("a", tensor), ("b", parameter)])
    assert torch.equal(GGUFFile(path).tensor("a"), tensor)
    assert torch.equal(GGUFFile(path).tensor("b"), parameter)


FIVE = torch.randn(2, 3, 1, 2, 2)


def test_five_dimensions_are_written_as_published_files_have_them(tmp_path):
    path = tmp_path / "a.gguf"
    codes = random_blocks(T.Q8_0, 12, 1), T.Q8_0, (2, 3, 1, 2, 32)
    write_gguf(path, "wan", {"text": "a"}, [("plain", FIVE), ("codes", codes)])
    file, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert torch.equal(file.tensor("plain"), FIVE) and file.tensors["codes"].shape == codes[2]
    assert [len(tensor.shape) for tensor in theirs.tensors] == [5, 5]


@pytest.mark.parametrize("field", [[1.0, 0.0], (True,), np.array([1, 2], np.uint8)], ids=str)
def test_beside_a_list_ggmls_four_dimensions_hold(tmp_path, field):
    """stable-diffusion.cpp reads no list in a file that ggml itself refuses."""
    path = tmp_path / "a.gguf"
    codes = random_blocks(T.Q8_0, 12, 1), T.Q8_0, (2, 3, 1, 2, 32)
    write_gguf(path, "wan", {"fewstep.sigmas.1": field}, [("plain", FIVE), ("codes", codes)])
    file, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert torch.equal(file.tensor("plain"), FIVE) and file.tensors["codes"].shape == codes[2]
    assert torch.equal(file.blocks("codes"), codes[0])
    assert [tuple(tensor.shape) for tensor in theirs.tensors] == [(2, 2, 1, 6), (32, 2, 1, 6)]
    assert theirs.fields["comfy.gguf.orig_shape.plain"].types == [V.ARRAY, V.INT32]


def test_shapes_that_ggml_cannot_hold_are_kept(tmp_path):
    """More than five dimensions, and rows of parts of blocks."""
    path = tmp_path / "a.gguf"
    six = torch.randn(2, 1, 2, 1, 2, 3)
    blocks = random_blocks(T.Q8_0, 1, 3)
    folded = random_blocks(T.Q6_K, 1, 9)  # rows of 3 are not whole blocks
    tensors = [
        ("five", FIVE),
        ("six", six),
        ("codes", (blocks, T.Q8_0, (2, 3, 4, 2, 2))),
        ("conv", (folded, T.Q6_K, (16, 16, 3, 3))),
    ]
    write_gguf(path, "wan", {}, tensors)
    file = GGUFFile(path)
    assert torch.equal(file.tensor("five"), FIVE) and torch.equal(file.tensor("six"), six)
    for name, data in (("codes", blocks), ("conv", folded)):
        info = file.tensors[name]
        assert torch.equal(file.blocks(name).flatten(), data.flatten())
        assert dequantize(file.blocks(name), info.qtype, info.shape).shape == info.shape
    assert file.tensors["conv"].shape == (16, 16, 3, 3)
    theirs = [tuple(tensor.shape) for tensor in gguf.GGUFReader(path).tensors]
    assert theirs == [(2, 2, 1, 6), (3, 2, 1, 4), (96,), (2304,)]


def test_data_is_made_when_its_turn_comes(tmp_path):
    path = tmp_path / "a.gguf"
    blocks = random_blocks(T.Q8_0, 64, 64)
    sizes = []

    def make():
        (temporary,) = tmp_path.iterdir()
        sizes.append(temporary.stat().st_size)
        return blocks

    write_gguf(path, "sd3", {}, [(name, (make, T.Q8_0, (64, 64 * 32))) for name in "abc"])
    assert np.diff(sizes).min() > 0.5 * blocks.numel()  # the one before is on its way to the disk
    file = GGUFFile(path)
    assert all(torch.equal(file.blocks(name), blocks) for name in "abc")


def test_metadata_of_another_file_can_be_passed_on(tmp_path):
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_gguf(first, "sd3", {"general.alignment": 64, "a": [1, 2]}, [("x", torch.ones(1))])
    metadata = GGUFFile(first).metadata
    assert "general.alignment" not in metadata
    write_gguf(second, "sd3", metadata, [("x", torch.ones(1))])
    assert second.read_bytes() == first.read_bytes()


def fail():
    raise RuntimeError("out of luck")


def interrupt():
    raise KeyboardInterrupt


Q8 = torch.zeros(34, dtype=torch.uint8)
FAILURES = {
    "data function": ({}, [("a", torch.ones(4)), ("b", (fail, T.Q8_0, (32,)))], "out of luck"),
    "interrupt": ({}, [("a", torch.ones(4)), ("b", (interrupt, T.Q8_0, (32,)))], "^$"),
    "size": ({}, [("a", (Q8, T.Q8_0, (64,)))], "tensor 'a': .* takes 68 bytes, not 34"),
    "size made": ({}, [("a", (lambda: Q8, T.Q8_0, (64,)))], "takes 68 bytes, not 34"),
    "blocks": ({}, [("a", (Q8, T.Q8_0, (5, 7)))], "does not divide"),
    "type": ({}, [("a", (Q8, 999, (32,)))], "type 999 is unknown"),
    "dtype": ({}, [("a", torch.ones(2, dtype=torch.complex64))], "'a' is torch.complex64"),
    "twice": ({}, [("a", torch.ones(1)), ("a", torch.ones(1))], "same name"),
    "none": ({"a": None}, [], "'a' has a value that GGUF does not store: None"),
    "nested": ({"a": [[1]]}, [], "'a' has a value"),
    "mixed": ({"a": [1, "b"]}, [], "'a' mixes types"),
    "empty": ({"a": []}, [], "'a' mixes types, or is empty"),
    "matrix": ({"a": np.ones((2, 2))}, [], "'a' is not a list of numbers"),
    "too large": ({"a": 2**64}, [], "'a' has a value"),
    "too large a float": ({"a": 1e300}, [], "float too large"),
    "surrogate": ({"a": "\ud800"}, [], "surrogates not allowed"),
    "architecture": ({"general.architecture": "flux"}, [], "another general.architecture"),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("before", [None, b"what was there"], ids=["new", "old"])
def test_failure_leaves_nothing_behind(tmp_path, case, before):
    metadata, tensors, message = FAILURES[case]
    path = tmp_path / "a.gguf"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises((GGUFError, RuntimeError, KeyboardInterrupt), match=message) as caught:
        write_gguf(path, "sd3", metadata, tensors)
    if caught.type is GGUFError:
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    else:
        assert case in ("data function", "interrupt")
    left = {found.name: found.read_bytes() for found in tmp_path.iterdir()}
    assert left == ({} if before is None else {"a.gguf": before})


def test_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(GGUFError, match=r"absent.*a.gguf: cannot be written: No such file"):
        write_gguf(tmp_path / "absent" / "a.gguf", "sd3", {}, [])


def test_file_is_replaced_under_those_who_read_it(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, "sd3", {}, [("a", torch.zeros(4))])
    old = GGUFFile(path).tensor("a").clone()
    write_gguf(path, "sd3", {}, [("a", torch.ones(4))])
    assert old.sum() == 0 and GGUFFile(path).tensor("a").sum() == 4


def test_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_gguf(tmp_path / "a.gguf", "sd3", {}, [])
    assert os.stat(tmp_path / "a.gguf").st_mode == os.stat(tmp_path / "plain").st_mode
