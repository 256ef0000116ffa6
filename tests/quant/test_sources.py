"""What can be opened: safetensors, whole and sharded, fp8 with scales, GGUF; what is refused."""

import json

import pytest
import torch
from fewstep.quant import GGUFError, write_gguf
from fewstep.quant.sources import open_source
from fewstep.tests.quant import models
from safetensors.torch import save_file

FP8 = torch.float8_e4m3fn


def read(source, name):
    tensor = source.tensors[name]
    parts = [tensor.read(*chunk) for chunk in tensor.chunks()]
    return torch.cat(parts).view(tensor.shape)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, FP8, torch.float8_e5m2]
)
def test_floats_are_read_as_they_are(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("fewstep.quant.stored.CHUNK", 40)
    tensor = torch.randn(7, 3, 5).to(dtype)
    save_file({"a": tensor, "b.weight": torch.ones(())}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    assert torch.equal(read(source, "a"), tensor.float())
    assert source.tensors["b.weight"].shape == ()


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.rand(6), torch.rand(6, 1)])
def test_fp8_is_read_with_its_scale(tmp_path, suffix, scale):
    weight = torch.randn(6, 32).to(FP8)
    tensors = {
        "l.weight": weight,
        f"l.{suffix}": scale,
        "l.input_scale": torch.ones(()),
        "scaled_fp8": torch.zeros(2, dtype=FP8),
        "plain.weight": torch.ones(2, 2).to(FP8),
        "l.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    assert set(source.tensors) == {"l.weight", "plain.weight"}
    want = weight.float() * (scale if scale.ndim != 1 else scale[:, None])
    assert torch.equal(read(source, "l.weight"), want)
    assert torch.equal(read(source, "plain.weight"), torch.ones(2, 2))


def test_other_packings_are_refused(tmp_path):
    tensors = {"l.weight": torch.zeros(4, 8, dtype=torch.uint8), "l.weight_scale": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(GGUFError, match=r"'l.weight' is U8 with a scale .* cannot be read"):
        open_source(tmp_path / "a.safetensors")
    mark = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file(tensors | {"l.comfy_quant": mark}, tmp_path / "b.safetensors")
    with pytest.raises(GGUFError, match=r"'l.weight' is"):
        open_source(tmp_path / "b.safetensors")


@pytest.mark.parametrize("face", ["index", "first", "last"])
def test_shards_are_one_model(tmp_path, face):
    """The scale of an fp8 weight may lie in another shard."""
    weight, second = torch.randn(4, 32).to(FP8), torch.randn(3, 3)
    names = [f"m-{n:05}-of-00002.safetensors" for n in (1, 2)]
    save_file({"a.weight": weight}, tmp_path / names[0], {"config": "{}"})
    save_file({"a.weight_scale": torch.tensor(2.0), "b.weight": second}, tmp_path / names[1])
    index = tmp_path / "m.safetensors.index.json"
    weight_map = {"a.weight": names[0], "a.weight_scale": names[1], "b.weight": names[1]}
    index.write_text(json.dumps({"weight_map": weight_map}))
    path = {"index": index, "first": tmp_path / names[0], "last": tmp_path / names[1]}[face]
    source = open_source(path)
    assert list(source.tensors) == ["a.weight", "b.weight"] and len(source.files) == 2
    assert torch.equal(read(source, "a.weight"), weight.float() * 2)
    assert torch.equal(read(source, "b.weight"), second)
    assert source.metadata == {"config": "{}"}
    (tmp_path / names[1]).unlink()
    if face != "last":
        with pytest.raises(GGUFError, match=r"shards are missing beside it: m-00002-of-00002"):
            open_source(path)


@pytest.mark.parametrize("shape", [(1, 6), (2, 3), (3, 2)])
def test_a_scale_for_each_block_is_refused(tmp_path, shape):
    """Even where there are as many as rows."""
    tensors = {"l.weight": torch.randn(6, 32).to(FP8), "l.weight_scale": torch.rand(shape)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(GGUFError, match=r"'l.weight' is F8_E4M3 with a scale of shape"):
        open_source(tmp_path / "a.safetensors")


def test_an_incomplete_set_of_shards_is_told(tmp_path):
    shard = tmp_path / "m-00001-of-00001.safetensors"
    save_file({"a.weight": torch.ones(2, 2)}, shard)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": shard.name, "b.weight": shard.name}}))
    with pytest.raises(GGUFError, match=r"'b\.weight' is in none of its shards"):
        open_source(index)
    shard.rename(tmp_path / "m-00002-of-00001.safetensors")
    with pytest.raises(GGUFError, match="no shard has this number"):
        open_source(tmp_path / "m-00002-of-00001.safetensors")
    (tmp_path / "m-00002-of-00001.safetensors").rename(tmp_path / "m-00001-of-99999.safetensors")
    with pytest.raises(GGUFError, match="m-00002-of-99999") as caught:
        open_source(tmp_path / "m-00001-of-99999.safetensors")
    assert len(str(caught.value)) < 1000


def test_gguf_keeps_what_describes_the_model(tmp_path):
    fields = {"general.name": "x", "fewstep.cfg": 1.0, "general.file_type": 7, "ids": [1, 2]}
    write_gguf(tmp_path / "a.gguf", "flux", fields, [("a", torch.ones(2, 3, 1, 1, 2))])
    source = open_source(tmp_path / "a.gguf")
    assert source.architecture == "flux" and source.tensors["a"].shape == (2, 3, 1, 1, 2)
    assert set(source.metadata) == {"general.name", "fewstep.cfg", "ids"}


def test_bad_files_are_told_in_one_line(tmp_path):
    good = tmp_path / "good.safetensors"
    save_file(models.sd3(), good)
    whole = good.read_bytes()
    contents = {
        "cut.safetensors": (whole[:-1], "1 of .* bytes are missing.*download it again"),
        "head.safetensors": (whole[:100], "the header is cut short"),
        "empty.safetensors": (b"", "empty"),
        "page.safetensors": (b"<!DOCTYPE html>" * 9, "a web page"),
        "json.safetensors": (whole[:8] + b"{" * (len(whole) - 8), "the header is no JSON"),
        "zip.safetensors": (b"PK\3\4" + bytes(60), "a zip .* get a GGUF or safetensors file"),
        "pickle.safetensors": (b"\x80\2" + bytes(60), "pickle .* get a GGUF or safetensors file"),
        "noise.safetensors": (b"\1\2" * 40, "get it again, or another GGUF or safetensors file"),
        "long.safetensors": (b"\0\0\0\x80\0\0\0\0" + whole[8:], "the header .* damaged"),
        "m.index.json": (b'{"a": 1}', "not the index of a sharded model"),
    }
    for name, (data, message) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(GGUFError, match=message) as caught:
            open_source(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    for ending in ("ckpt", "pt", "bin", "pth"):
        with pytest.raises(GGUFError, match="a pickle"):
            open_source(tmp_path / f"model.{ending}")
    with pytest.raises(GGUFError, match="a folder"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "entry", [("F32", (2, 2), 0, 15), ("F32", (2, 2), -4, 12), ("F99", (2,), 0, 8)]
)
def test_entries_that_do_not_add_up_are_refused(tmp_path, entry):
    models.header_only(tmp_path / "a.safetensors", {"a": entry}, bytes(16))
    with pytest.raises(GGUFError, match="tensor 'a'"):
        open_source(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2.0, 2.0]},
        {"shape": [-2, -2]},
        {"shape": ["2", 2]},
        {"shape": [2**70, 0], "data_offsets": [0, 0]},
        {"data_offsets": [0.0, 16.0]},
        {"data_offsets": [None, 16]},
        {"dtype": ["F32"]},
    ],
)
def test_entries_of_other_kinds_are_refused(tmp_path, change):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | change
    text = json.dumps({"a": entry}).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(16)
    (tmp_path / "a.safetensors").write_bytes(whole)
    with pytest.raises(GGUFError, match="tensor 'a'"):
        open_source(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"__metadata__": ["a"]}', "__metadata__ holds no texts"),
        (b'{"a": ' + b"[" * 10**5 + b"}", "the header is no JSON"),
    ],
)
def test_headers_of_other_kinds_are_refused(tmp_path, text, message):
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(GGUFError, match=message):
        open_source(tmp_path / "a.safetensors")


def test_a_tensor_of_gguf_bytes_needs_no_alignment(tmp_path):
    """Plain file reads land in memory of their own."""
    write_gguf(tmp_path / "a.gguf", "x", {}, [("a", torch.ones(3)), ("b", torch.arange(5.0))])
    assert torch.equal(read(open_source(tmp_path / "a.gguf"), "b"), torch.arange(5.0))
