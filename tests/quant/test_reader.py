"""A good file: all of it can be read, and nothing is before it is asked for."""

import gc
import os
import sys
import time
import warnings
import weakref

import gguf
import numpy as np
import pytest
import torch
from fewstep.quant import GGUFError, GGUFFile, dequantize
from fewstep.tests.quant import crafted

T = gguf.GGMLQuantizationType


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(crafted.small())
    return path


def test_metadata_has_every_field(small):
    file = GGUFFile(small)
    assert (file.path, file.version, file.architecture) == (str(small), 3, "sd3")
    assert dict(file.metadata) == {
        "general.architecture": "sd3",
        "general.alignment": 32,
        "a.flag": True,
        "a.number": 1.5,
        "a.long": -(2**40),
        "a.tokens": ["one", "zwei", "drei ü", ""],
        "a.scores": [0.5, -1.0, 2.0],
        "comfy.gguf.orig_shape.folded": [8, 32],
    }
    assert file.metadata.element_type("a.scores") is gguf.GGUFValueType.FLOAT32
    assert file.metadata.element_type("a.flag") is None
    assert "a.tokens" in file.metadata and "b" not in file.metadata


def test_architecture_may_be_missing(tmp_path):
    path = tmp_path / "none.gguf"
    path.write_bytes(crafted.gguf())
    file = GGUFFile(path)
    assert file.architecture is None and not file.tensors and not file.metadata


@pytest.mark.parametrize("kind", [kind for kind in gguf.GGUFValueType if kind.name != "ARRAY"])
def test_each_value_type_as_gguf_reads_it(tmp_path, kind):
    value = {"STRING": "läuft", "BOOL": True}.get(kind.name, 7)
    path = tmp_path / "value.gguf"
    writer = gguf.GGUFWriter(path, "sd3")
    writer.add_key_value("one", value, kind)
    writer.add_key_value("many", [value] * 3, gguf.GGUFValueType.ARRAY, sub_type=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.metadata["one"] == value and file.metadata["many"] == [value] * 3
    assert type(file.metadata["one"]) is type(file.metadata["many"][0])


def test_tensors_as_gguf_reads_them(small):
    file = GGUFFile(small)
    for theirs in gguf.GGUFReader(small).tensors:
        ours = file.tensors[theirs.name]
        assert (ours.qtype, ours.nbytes) == (theirs.tensor_type, theirs.n_bytes)
        assert ours.offset == theirs.data_offset
        data = np.ascontiguousarray(theirs.data).view(np.uint8).reshape(-1)
        assert np.array_equal(file.blocks(theirs.name).flatten().numpy(), data)


def test_shapes_outermost_first(small):
    file = GGUFFile(small)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    assert shapes == {
        "plain": (2, 3),
        "half": (5,),
        "folded": (8, 32),
        "codes": (2, 256),
        "scalar": (),
        "empty": (4, 0),
        "wide": (2, 2, 1, 2, 1),
    }
    rows = {name: tuple(file.blocks(name).shape) for name in shapes}
    assert rows == {
        "plain": (2, 12),
        "half": (1, 10),
        "folded": (1, 210),  # rows of 32 are not whole blocks of 256
        "codes": (2, 66),
        "scalar": (1, 4),
        "empty": (4, 0),
        "wide": (8, 4),
    }
    for name, info in file.tensors.items():
        blocks = file.blocks(name)
        assert dequantize(blocks, info.qtype, info.shape).shape == info.shape
        if not info.is_quantized:
            assert file.tensor(name).shape == info.shape
    assert [name for name, info in file.tensors.items() if info.is_quantized] == ["folded", "codes"]


def test_plain_tensor_of_a_quantised_one_is_told(small):
    with pytest.raises(GGUFError, match=r"small.gguf: tensor 'codes' is IQ2_XXS: dequantise"):
        GGUFFile(small).tensor("codes")
    with pytest.raises(GGUFError, match=r"small.gguf: there is no tensor 'other'"):
        GGUFFile(small).blocks("other")


def test_alignment_of_the_file_is_kept(tmp_path):
    values = np.arange(8, dtype=np.float32)
    path = tmp_path / "aligned.gguf"
    head = [crafted.u32("general.alignment", 1024)], [crafted.tensor("a", (8,), 0, 1024)]
    path.write_bytes(crafted.gguf(*head, bytes(1024) + values.tobytes(), align=1024))
    file = GGUFFile(path)
    assert file.tensors["a"].offset == 2048
    assert np.array_equal(file.tensor("a").numpy(), values)


def test_tensor_at_an_odd_address(tmp_path):
    values = np.arange(8, dtype=np.float32)
    path = tmp_path / "odd.gguf"
    head = [crafted.u32("general.alignment", 1)], [crafted.tensor("odd", (8,), 0, 0)]
    path.write_bytes(crafted.gguf(*head, values.tobytes(), align=1))
    assert np.array_equal(GGUFFile(path).tensor("odd").numpy(), values)


def test_version_2_reads_the_same(tmp_path):
    path = tmp_path / "two.gguf"
    path.write_bytes(crafted.gguf([crafted.u32("a", 1)], [crafted.tensor("b", (1,))], bytes(4), 2))
    file = GGUFFile(path)
    assert (file.version, file.metadata["a"], file.tensor("b").tolist()) == (2, 1, [0.0])


def test_views_outlive_the_file_object(small):
    with GGUFFile(small) as file:
        want = file.tensor("plain").clone()
        view = file.tensor("plain")
    with pytest.raises(GGUFError, match=r"small.gguf: tensor 'plain' .* after closing"):
        file.tensor("plain")
    with pytest.raises(GGUFError, match=r"small.gguf: field 'a.tokens' .* after closing"):
        file.metadata["a.tokens"]
    assert file.metadata["a.number"] == 1.5
    del file
    gc.collect()
    assert torch.equal(view, want)


def test_map_goes_with_its_last_view(small):
    file = GGUFFile(small)
    mapping = weakref.ref(file._map)
    view = file.blocks("plain")
    file.close()
    assert mapping() is not None
    del view
    gc.collect()
    assert mapping() is None


def test_writing_to_a_tensor_leaves_the_file_alone(small):
    before = small.read_bytes()
    file = GGUFFile(small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that it must not write to
        tensor = file.tensor("plain")
    tensor.fill_(7)
    assert GGUFFile(small).tensor("plain").ne(7).any()
    assert small.read_bytes() == before


def sparse(path, gigabytes):
    """A file of F16 zeros that takes no room on the disk."""
    weights = gigabytes * 2**29
    head = crafted.gguf(tensors=[crafted.tensor("big", (2**20, weights // 2**20), T.F16)])
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + 2 * weights)
        os.fsync(file.fileno())
    return path


def test_file_larger_than_memory_opens(tmp_path):
    file = GGUFFile(sparse(tmp_path / "huge.gguf", 512))
    tensor = file.tensor("big")
    assert tensor.shape == (2**18, 2**20)
    assert tensor[-1, -5:].tolist() == [0] * 5


if sys.platform == "linux":  # the others keep no such account of a mapping's pages

    def test_mapped_bytes_are_neither_read_nor_dirty(tmp_path):
        path = sparse(tmp_path / "big.gguf", 1)
        file = GGUFFile(path)
        tensor = file.tensor("big")
        assert pages(path)["Rss"] < 1024  # KiB of 1 GiB: the header, and some read ahead
        assert tensor[:16].sum() == 0  # 32 MiB
        assert pages(path)["Rss"] > 30 * 1024
        assert pages(path)["Private_Dirty"] == 0

    def pages(path):
        """KiB by kind, summed over this process's mappings of the file."""
        sums = {"Rss": 0, "Private_Dirty": 0}
        with open("/proc/self/smaps") as lines:
            for words in map(str.split, lines):
                if not words[0].endswith(":"):
                    ours = words[-1] == str(path)
                elif ours and words[0][:-1] in sums:
                    sums[words[0][:-1]] += int(words[1])
        return sums


def test_tokenizer_arrays_cost_nothing_until_asked_for(tmp_path):
    path = tmp_path / "tokens.gguf"
    tokens = [f"token {i}" for i in range(250_000)]
    scores = np.arange(250_000, dtype=np.float32)
    fields = [
        crafted.strings("tokenizer.ggml.tokens", tokens),
        crafted.strings("tokenizer.ggml.merges", tokens),
        crafted.array("tokenizer.ggml.scores", 6, len(scores), scores.tobytes()),
    ]
    path.write_bytes(crafted.gguf(fields))
    start = time.process_time()
    file = GGUFFile(path)
    assert time.process_time() - start < 0.5  # s; gguf-py takes about 20
    assert file.metadata["tokenizer.ggml.tokens"] == tokens
    assert file.metadata["tokenizer.ggml.scores"] == scores.tolist()


def test_a_header_of_many_entries_is_fine(tmp_path):
    path = tmp_path / "many.gguf"
    count = 100_000
    fields = [crafted.u32(f"key.{i}", i) for i in range(count)]
    tensors = [crafted.tensor(f"tensor.{i}", (2,), 0, 32 * i) for i in range(count)]
    path.write_bytes(crafted.gguf(fields, tensors, bytes(32 * count)))
    start = time.process_time()
    file = GGUFFile(path)
    assert time.process_time() - start < 5  # s
    assert len(file.metadata) == len(file.tensors) == count
    assert file.tensor(f"tensor.{count - 1}").tolist() == [0, 0]


def test_path_may_be_text_or_a_path(small):
    assert GGUFFile(os.fspath(small)).tensors == GGUFFile(small).tensors
