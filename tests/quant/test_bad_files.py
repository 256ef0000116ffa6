"""What is wrong with a file is told in one line: its name, the place, the remedy."""

import re
import struct
import time
import tracemalloc

import numpy as np
import pytest
from fewstep.quant import GGUFError, GGUFFile
from fewstep.tests.quant import crafted
from fewstep.tests.quant.crafted import array, field, gguf, string, tensor, text, u32
from gguf import GGUFValueType as V

HUGE = 2**63
TWO = [tensor("a", (8,), 0, 0), tensor("b", (8,), 0, 32)]  # 64 bytes of data

NOT_GGUF = {
    "empty": (b"", "is empty: download it again"),
    "safetensors": (struct.pack("<Q", 64) + b'{"a":{}}', "safetensors"),
    "zip": (b"PK\x03\x04" + bytes(60), "no pickle is ever loaded"),
    "pickle": (b"\x80\x02}q\x00.", "no pickle is ever loaded"),
    "html": (b"\n<!DOCTYPE html><html>", "web page"),
    "html after a mark": (b"\xef\xbb\xbf<html>", "web page"),
    "json": (b'{"error":"not found"}', "JSON"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "old ggml": (b"tjgg" + bytes(32), "came before GGUF"),
    "swapped magic": (b"FUGG" + bytes(32), "big-endian"),
    "zeros": (bytes(64), "has not finished"),
    "text": (b"hello", "begins with b'hell'"),
    "one byte": (b"G", "begins with b'G'"),
}

DAMAGED = {
    "magic alone": (b"GGUF", "header is cut off"),
    "no counts": (b"GGUF\3\0\0\0", "header is cut off"),
    "version 1": (gguf(version=1), "version 1 .* current llama.cpp"),
    "version 4": (gguf(version=4), "update FewStep"),
    "version 0": (gguf(version=0), "version 0"),
    "big-endian": (gguf(version=0x03000000), "big-endian"),
    "tensor count": (gguf(counts=(HUGE, 0)), "cannot fit"),
    "field count": (gguf(counts=(0, HUGE)), "cannot fit"),
    "count just too large": (gguf([u32("a", 1)], counts=(0, 9)), "cannot fit"),
    "key length": (gguf([struct.pack("<Q", HUGE) + bytes(64)]), "a metadata key claims"),
    "key too long": (gguf([u32("k" * 70_000, 1)]), "a metadata key claims a length of 70000"),
    "key not UTF-8": (gguf([field(b"\xff\xfe", V.UINT8, b"\0")]), "metadata key is not UTF-8"),
    "string length": (
        gguf([field("a", V.STRING, struct.pack("<Q", HUGE))], data=bytes(64)),
        "'a' claims a length",
    ),
    "string not UTF-8": (gguf([string("a", b"\xc3(")]), "'a' is not UTF-8"),
    "same key": (gguf([u32("a", 1), u32("b", 1), u32("a", 2)]), "field 'a' occurs twice"),
    "value type": (gguf([field("a", 13, bytes(8))]), "'a' has the unknown type 13"),
    "entry type": (gguf([array("a", 99, 1, bytes(8))]), "'a' has entries of the unknown type 99"),
    "array count": (gguf([array("a", V.FLOAT32, HUGE, b"")], data=bytes(64)), "cannot fit"),
    "strings count": (gguf([array("a", V.STRING, HUGE, b"")], data=bytes(64)), "cannot fit"),
    "string in array": (
        gguf([array("a", V.STRING, 2, text("x") + struct.pack("<Q", HUGE))], data=bytes(64)),
        "string of field 'a' ends beyond",
    ),
    "array of arrays": (gguf([array("a", V.ARRAY, 1, bytes(64))]), "'a' nests arrays"),
    "alignment 0": (gguf([u32("general.alignment", 0)]), "general.alignment is 0"),
    "alignment 33": (gguf([u32("general.alignment", 33)]), "general.alignment is 33"),
    "alignment text": (gguf([string("general.alignment", "32")]), "general.alignment is '32'"),
    "name not UTF-8": (gguf([], [tensor(b"\xff", (1,))], bytes(4)), "name is not UTF-8"),
    "name length": (gguf([], [struct.pack("<Q", HUGE) + bytes(64)]), "a tensor's name claims"),
    "same name": (gguf([], [TWO[0], TWO[0]], bytes(64)), "tensor 'a' occurs twice"),
    "dimensions": (gguf([], [tensor("a", (1,) * 6)], bytes(4)), "'a' claims 6 dimensions"),
    "unknown type": (gguf([], [tensor("a", (32,), 200)], bytes(64)), "'a': .* 200 is unknown"),
    "removed type": (gguf([], [tensor("a", (32,), 31)], bytes(64)), "'a': .*ggml has removed"),
    "type not for files": (gguf([], [tensor("a", (32,), 9)], bytes(64)), "'a': .*not meant"),
    "one size overflows": (gguf([], [tensor("a", (HUGE,))], bytes(64)), "impossible shape"),
    "product overflows": (
        gguf([], [tensor("a", (2**32, 2**32))], bytes(64)),
        "impossible shape",
    ),
    "overflow beside a zero": (
        gguf([], [tensor("a", (0, 2**40, 2**40))], bytes(64)),
        "impossible shape",
    ),
    "row not in blocks": (gguf([], [tensor("a", (33,), 2)], bytes(64)), "'a': Q4_0 packs 32"),
    "misaligned": (gguf([], [tensor("a", (1,), 0, 16)], bytes(64)), "'a' lies at 16"),
    "overlap": (gguf([], [TWO[0], tensor("b", (8,), 0, 0)], bytes(64)), "'a' and 'b' overlap"),
    "partial overlap": (
        gguf([], [tensor("a", (9,)), TWO[1]], bytes(64)),
        "'a' and 'b' overlap",
    ),
    "offset past the end": (
        gguf([], [TWO[0], tensor("b", (8,), 0, 2**40)], bytes(64)),
        "'b' lies beyond the file's end",
    ),
    "offset overflows": (
        gguf([], [TWO[0], tensor("b", (8,), 0, 2**64 - 32)], bytes(64)),
        "'b' lies beyond the file's end",
    ),
    "data cut": (gguf([], TWO, bytes(50)), r"14 of \d+ bytes are missing, from tensor 'b' on"),
    "no data": (gguf([], TWO), r"64 of \d+ bytes are missing, from tensor 'a' on"),
    "shape of another size": (
        gguf([array("comfy.gguf.orig_shape.a", V.INT32, 1, b"\7\0\0\0")], TWO, bytes(64)),
        "orig_shape.a' does not fit",
    ),
    "shape of text": (
        gguf([string("comfy.gguf.orig_shape.a", "8")], TWO, bytes(64)),
        "orig_shape.a' does not fit",
    ),
    "negative shape": (
        gguf(
            [array("comfy.gguf.orig_shape.a", V.INT32, 2, struct.pack("<2i", -2, -4))],
            TWO,
            bytes(64),
        ),
        "impossible shape",
    ),
    "a part": (
        gguf([field("split.no", V.UINT16, b"\0\0"), field("split.count", V.UINT16, b"\3\0")]),
        "one of 3 parts .*llama-gguf-split --merge",
    ),
}


def message_for(path):
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.count(str(path)) == 1
    assert "\n" not in message
    return message


@pytest.mark.parametrize("case", NOT_GGUF | DAMAGED)
def test_bad_bytes_are_told(tmp_path, case):
    content, told = (NOT_GGUF | DAMAGED)[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert re.search(told, message_for(path))


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in message_for(tmp_path / "absent.gguf")
    assert "irectory" in message_for(tmp_path)


def test_every_truncation_is_told(tmp_path):
    """Cut anywhere, a file never opens: the last tensor fills it to its end."""
    path = tmp_path / "cut.gguf"
    whole = crafted.small()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        message = message_for(path)
        assert "download" in message or "get a GGUF file" in message, (size, message)


def test_array_that_is_not_utf8_is_told_when_asked_for(tmp_path):
    path = tmp_path / "tokens.gguf"
    path.write_bytes(gguf([array("tokens", V.STRING, 2, text("a") + text(b"\xff"))]))
    file = GGUFFile(path)
    with pytest.raises(GGUFError, match=r"tokens.gguf: an entry of field 'tokens' is not UTF-8"):
        file.metadata["tokens"]


@pytest.mark.parametrize(
    "claim", ["tensors", "fields", "strings", "many strings", "numbers", "dimension"]
)
def test_absurd_claims_are_refused_at_once(tmp_path, claim):
    """Within a file of 256 MiB of zeros, where a naive loop would find plausible entries."""
    count = 2**22
    content = {
        "tensors": gguf(counts=(count // 2, 0)),
        "fields": gguf(counts=(0, count)),
        "strings": gguf([array("a", V.STRING, 2**40, b"")]),
        "many strings": gguf([array("a", V.STRING, 2**24 + 1, b"")]),
        "numbers": gguf([array("a", V.UINT8, 2**40, b"")]),
        "dimension": gguf([], [tensor("a", (2**40,))]),
    }[claim]
    path = tmp_path / "absurd.gguf"
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(2**28)
    tracemalloc.start()
    start = time.process_time()
    message_for(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 2**20


def test_fuzzed_files_are_read_or_told(tmp_path):
    """Bytes of a good file changed at random: GGUFError, or every tensor and field can be read."""
    rng = np.random.default_rng(0)
    good = np.frombuffer(crafted.small(), np.uint8)
    header = int(len(good) - 512)
    path = tmp_path / "fuzzed.gguf"
    outcomes = {"read": 0, "told": 0}
    for _ in range(1500):
        bad = good.copy()
        for place in rng.integers(0, header, rng.integers(1, 4)):
            bad[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        path.write_bytes(bad.tobytes())
        outcomes[read_all(path)] += 1
    assert outcomes["read"] > 50 and outcomes["told"] > 500


def read_all(path):
    try:
        with GGUFFile(path) as file:
            dict(file.metadata)
            for name, info in file.tensors.items():
                assert file.blocks(name).numel() == info.nbytes
                if not info.is_quantized:
                    assert file.tensor(name).shape == info.shape
    except GGUFError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return "told"
    return "read"
