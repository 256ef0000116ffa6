"""A model becomes a GGUF file: what each tensor turns into, streamed, whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from fewstep.quant import GGUFError, GGUFFile, dequantize, quantize, write_gguf
from fewstep.quant.convert import Options, convert
from fewstep.quant.measure import Errors
from fewstep.quant.plan import make_plan
from fewstep.quant.recipes import recipe_named, recipe_of_type
from fewstep.quant.sources import open_source
from fewstep.tests.quant import models
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


def make(source, target, recipe=T.Q8_0, metadata=None, options=None, **plan):
    recipe = recipe_of_type(recipe) if isinstance(recipe, T) else recipe_named(recipe)
    return convert(make_plan(open_source(source), recipe, **plan), target, metadata, options)


def weights(file, name):
    info = file.tensors[name]
    return dequantize(file.blocks(name), info.qtype, info.shape)


@pytest.fixture
def source(tmp_path):
    """(path, state dict) of a small SD3 in bf16."""
    state_dict = models.sd3()
    save_file(state_dict, tmp_path / "sd3.safetensors", {"modelspec.title": "small"})
    return tmp_path / "sd3.safetensors", state_dict


@pytest.mark.parametrize("qtype", [T.Q8_0, T.Q4_0, T.F16, T.BF16])
def test_matrices_become_what_quantize_gives(tmp_path, source, qtype):
    path, state_dict = source
    make(path, tmp_path / "a.gguf", qtype)
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.architecture == "sd3" and list(file.tensors) == sorted(state_dict)
    for name, tensor in state_dict.items():
        info = file.tensors[name]
        assert info.shape == tuple(tensor.shape)
        if "block" in name and tensor.ndim == 2:
            assert info.qtype is qtype
            assert torch.equal(file.blocks(name), quantize(tensor.float(), qtype))
        else:
            assert torch.equal(weights(file, name), tensor.float())


def test_delicate_and_small_tensors_keep_their_bits(tmp_path, source):
    make(source[0], tmp_path / "a.gguf", T.Q4_0)
    tensors = GGUFFile(tmp_path / "a.gguf").tensors
    for name in ("context_embedder.weight", "final_layer.linear.weight", "x_embedder.proj.weight"):
        assert tensors[name].qtype is T.BF16
    assert tensors["pos_embed"].qtype is T.F32  # a bare parameter
    assert tensors["x_embedder.proj.bias"].qtype is T.F32


@pytest.mark.parametrize("qtype", [T.Q8_0, T.BF16])
def test_a_source_of_these_types_is_told(tmp_path, source, qtype):
    first = make(source[0], tmp_path / "a.gguf", T.Q8_0)
    assert not any("nothing" in note for note in first.notes)
    make(source[0], tmp_path / "a.gguf", qtype)
    again = make(str(tmp_path / "a.gguf"), tmp_path / "b.gguf", qtype)
    assert any("nothing was quantised" in note for note in again.notes)


def test_a_source_that_is_unpacked_is_not_called_one_of_these_types(tmp_path):
    """Its delicate tensors stay quantised, its matrices do not."""
    blocks = {
        name: (quantize(tensor.float(), T.Q8_0), T.Q8_0, tensor.shape)
        for name, tensor in models.sd3().items()
        if name.endswith("weight") and tensor.ndim == 2
    }
    write_gguf(tmp_path / "a.gguf", "sd3", {}, blocks.items())
    report = make(str(tmp_path / "a.gguf"), tmp_path / "b.gguf", T.F16)
    assert {row.qtype for row in report.rows} == {"Q8_0", "F16"}
    assert not any("nothing" in note for note in report.notes)


def test_gguf_py_reads_it_and_the_fields_are_there(tmp_path, source):
    fields = {"fewstep.version": 1, "fewstep.sigmas.2": [1.0, 0.5, 0.0]}
    make(source[0], tmp_path / "a.gguf", T.Q8_0, fields)
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert file.metadata["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert file.metadata["general.name"] == "small"
    assert file.metadata["fewstep.sigmas.2"] == [1.0, 0.5, 0.0]
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    name = "joint_blocks.0.x_block.mlp.fc2.weight"
    assert np.array_equal(theirs[name].data, file.blocks(name).numpy())


def test_large_tensors_come_in_pieces_and_are_the_same(tmp_path, source, monkeypatch):
    make(source[0], tmp_path / "whole.gguf", T.Q4_0)
    monkeypatch.setattr("fewstep.quant.stored.CHUNK", 3000)
    seen = []
    options = Options(progress=lambda done, total, name: seen.append((done, total)))
    make(source[0], tmp_path / "pieces.gguf", T.Q4_0, options=options)
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert len(seen) > 100 and seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_report_has_the_errors(tmp_path, source):
    path, state_dict = source
    report = make(path, tmp_path / "a.gguf", T.Q4_0)
    file = GGUFFile(tmp_path / "a.gguf")
    for row in report.rows:
        x, y = state_dict[row.name].double(), weights(file, row.name).double()
        if row.errors is None:
            assert torch.equal(x, y)
            continue
        error = (x - y).norm()
        assert row.errors.rmse == pytest.approx(float(error) / x.numel() ** 0.5, rel=1e-5)
        assert row.errors.relative == pytest.approx(float(error / x.norm()), rel=1e-5)
        cosine = float((x * y).sum() / x.norm() / y.norm())
        assert row.errors.cosine == pytest.approx(cosine, abs=1e-6)
    assert report.size == (tmp_path / "a.gguf").stat().st_size
    assert 4.5 < report.bits < 6
    assert report.worst[0].errors.relative == max(r.errors.relative for r in report.worst)


def test_gguf_source_is_quantised_again_and_keeps_its_fields(tmp_path, source):
    make(source[0], tmp_path / "a.gguf", T.Q8_0, {"fewstep.cfg": 1.5, "other.words": ["a", "b"]})
    make(tmp_path / "a.gguf", tmp_path / "b.gguf", T.Q4_0)
    first, second = GGUFFile(tmp_path / "a.gguf"), GGUFFile(tmp_path / "b.gguf")
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    assert torch.equal(second.blocks(name), quantize(weights(first, name), T.Q4_0))
    assert second.metadata["fewstep.cfg"] == 1.5
    assert second.metadata["other.words"] == ["a", "b"]
    assert second.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    make(tmp_path / "b.gguf", tmp_path / "c.gguf", T.Q8_0)  # 4 bits do not become 8
    assert GGUFFile(tmp_path / "c.gguf").tensors[name].qtype is T.Q4_0
    make(tmp_path / "b.gguf", tmp_path / "d.gguf", T.F16)  # but floats when these are asked for
    assert GGUFFile(tmp_path / "d.gguf").tensors[name].qtype is T.F16


def test_clip_is_told_as_city96s_loader_asks(tmp_path):
    """Its type, and positions as plain floats, which ComfyUI reads past the loader's layers."""
    positions = "text_model.embeddings.position_embedding.weight"
    names = models.names_of("text_model.encoder.layers.0.self_attn.q_proj.weight", positions)
    save_file({name: t.bfloat16() for name, t in names.items()}, tmp_path / "l.safetensors")
    make(tmp_path / "l.safetensors", tmp_path / "l.gguf", T.Q8_0)
    file = GGUFFile(tmp_path / "l.gguf")
    assert (file.architecture, file.metadata["general.type"]) == ("clip", "clip-vision")
    assert file.tensors[positions].qtype is T.F32
    make(tmp_path / "l.gguf", tmp_path / "m.gguf", T.Q4_0, {"general.type": "model"})
    assert GGUFFile(tmp_path / "m.gguf").metadata["general.type"] == "model"


def test_five_dimensions_and_odd_names_come_back(tmp_path):
    tensors = {
        "patch embedding/größe.weight": torch.randn(8, 4, 1, 2, 2),
        "wide.weight": torch.randn(2, 3, 4, 2, 64).bfloat16(),
        "head.modulation": torch.randn(1, 2, 64),
        "scalar": torch.tensor(3.0),
        "__x0__": torch.zeros(0),
        "position_ids": torch.arange(77).view(1, 77),
        "m" * 100 + ".weight": torch.randn(64, 64),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    make(tmp_path / "a.safetensors", tmp_path / "a.gguf", T.F32, overrides=[("*", T.F32)])
    file = GGUFFile(tmp_path / "a.gguf")
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        got = file.tensor(name)
        assert got.shape == tensor.shape and torch.equal(got, tensor.to(got.dtype))
    make(tmp_path / "a.gguf", tmp_path / "b.gguf", T.Q8_0, overrides=[("wide.*", T.Q8_0)])
    again = GGUFFile(tmp_path / "b.gguf")
    assert again.tensors["wide.weight"].shape == (2, 3, 4, 2, 64)
    assert again.tensors["wide.weight"].qtype is T.Q8_0
    assert torch.allclose(weights(again, "wide.weight"), tensors["wide.weight"].float(), atol=0.02)


def test_destination_is_checked_before_any_work(tmp_path, source, monkeypatch):
    path, _ = source
    (tmp_path / "link.gguf").symlink_to(path)
    (tmp_path / "other.safetensors").write_bytes(b"a model that somebody wants to keep")
    monkeypatch.setattr("fewstep.quant.convert.write_gguf", None)  # would fail if it came so far
    for target, message in {
        path: "is the source itself",
        tmp_path / "link.gguf": "is the source itself",
        tmp_path: "a folder",
        tmp_path / "absent" / "a.gguf": "no folder",
        tmp_path / "other.safetensors": "not a .gguf file",
        Path(os.devnull): "not a .gguf file",
    }.items():
        with pytest.raises(GGUFError, match=message):
            make(path, target)
    with monkeypatch.context() as locked:
        locked.setattr("os.access", lambda path, mode: False)
        with pytest.raises(GGUFError, match="cannot be written: change its permissions"):
            make(path, tmp_path / "a.gguf")
    disk = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: disk)
    with pytest.raises(GGUFError, match=r"takes .* MB, but only 1 kB are free"):
        make(path, tmp_path / "a.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_only_a_file_is_replaced(tmp_path, source):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(GGUFError, match=r"pipe\.gguf: not a \.gguf file"):
        make(source[0], tmp_path / "pipe.gguf")
    assert (tmp_path / "pipe.gguf").is_fifo()


@pytest.mark.skipif(os.name == "nt", reason="Windows tells of long names in its own way")
@pytest.mark.parametrize("length", [250, 300])
def test_names_too_long_are_told(tmp_path, source, length):
    with pytest.raises(GGUFError, match=r"gguf: .*[Ff]ile name too long"):
        make(source[0], tmp_path / ("x" * (length - 5) + ".gguf"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weight_is_named_and_refused(tmp_path, value):
    tensors = {"blk.weight": torch.randn(64, 64), "fine.weight": torch.randn(64, 64)}
    tensors["blk.weight"][3, 5] = value
    save_file(tensors, tmp_path / "a.safetensors")
    target = tmp_path / "a.gguf"
    target.write_bytes(b"old")
    with pytest.raises(
        GGUFError, match=r"'blk.weight' holds 1 NaN or infinite weights, row 3"
    ) as e:
        make(tmp_path / "a.safetensors", target)
    assert "\n" not in str(e.value) and "--allow-nonfinite" in str(e.value)
    assert target.read_bytes() == b"old"
    report = make(tmp_path / "a.safetensors", target, options=Options(allow_nonfinite=True))
    assert any("'blk.weight'" in note and "stored as 0" in note for note in report.notes)
    got = weights(GGUFFile(target), "blk.weight")
    assert got[3, 5] == 0 and got.isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_nonfinite_weights_are_one_note_a_tensor(tmp_path, monkeypatch, threads):
    """However its pieces fall to threads."""
    monkeypatch.setattr("fewstep.quant.stored.CHUNK", 256)
    x = torch.randn(64, 64)
    x[[7, 30, 63]] = float("nan")
    save_file({"blk.weight": x}, tmp_path / "a.safetensors")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        allowed = Options(allow_nonfinite=True)
        report = make(tmp_path / "a.safetensors", tmp_path / "a.gguf", options=allowed)
    finally:
        torch.set_num_threads(before)
    told = [note for note in report.notes if "NaN" in note]
    assert told == ["tensor 'blk.weight' holds 192 NaN or infinite weights, row 7 on: stored as 0"]


def test_blocks_that_are_copied_keep_their_nan(tmp_path):
    blocks = quantize(torch.randn(64, 64), T.Q8_0)
    blocks[0, :2] = torch.tensor([0, 0x7E], dtype=torch.uint8)
    write_gguf(tmp_path / "a.gguf", "x", {}, [("blk.weight", (blocks, T.Q8_0, (64, 64)))])
    allowed = Options(allow_nonfinite=True)
    report = make(tmp_path / "a.gguf", tmp_path / "b.gguf", options=allowed)
    assert torch.equal(GGUFFile(tmp_path / "b.gguf").blocks("blk.weight"), blocks)
    assert any("32 NaN" in note and note.endswith("kept") for note in report.notes)


def test_what_f16_cannot_hold_is_told(tmp_path):
    save_file({"blk.weight": torch.full((64, 64), 1e6)}, tmp_path / "a.safetensors")
    with pytest.raises(GGUFError, match=r"'blk.weight' holds 1000000.0, which F16 cannot"):
        make(tmp_path / "a.safetensors", tmp_path / "a.gguf", T.F16)


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("qtype", [T.F16, T.Q8_0, T.Q4_1, T.Q2_K, T.Q6_K])
def test_a_weight_too_large_for_a_blocks_scale_is_told(tmp_path, qtype, measure):
    """ggml writes an infinite scale, and the block is NaN in every picture."""
    x = torch.randn(64, 256)
    x[3, 5], x[60, 5] = 1e9, float("nan")
    save_file({"blk.weight": x}, tmp_path / "a.safetensors")
    options = Options(allow_nonfinite=True, measure=measure)
    with pytest.raises(GGUFError, match=rf"'blk.weight' holds 1\d*.0, which {qtype.name} cannot"):
        make(tmp_path / "a.safetensors", tmp_path / "a.gguf", qtype, options=options)
    x[3, 5] = 1e5 if qtype is not T.F16 else 6e4
    x[60, 5] = 0
    save_file({"blk.weight": x}, tmp_path / "a.safetensors")
    make(tmp_path / "a.safetensors", tmp_path / "a.gguf", T.Q8_0, options=options)
    assert weights(GGUFFile(tmp_path / "a.gguf"), "blk.weight").isfinite().all()


def test_interrupt_leaves_the_old_file(tmp_path, source):
    def stop(done, total, name):
        if done > total // 2:
            raise KeyboardInterrupt

    target = tmp_path / "a.gguf"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        make(source[0], target, options=Options(progress=stop))
    assert target.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "sd3.safetensors"}


def test_tensors_stored_flat_are_read_row_by_row(tmp_path, monkeypatch):
    """Rows of 3 in Q8_0 blocks of 32, as city96's converter folds convolutions."""
    x = torch.randn(64, 3).mul(0.1)
    blocks = quantize(x.reshape(6, 32), T.Q8_0)
    write_gguf(tmp_path / "a.gguf", "sdxl", {}, [("conv.weight", (blocks, T.Q8_0, (64, 3)))])
    monkeypatch.setattr("fewstep.quant.stored.CHUNK", 50)
    make(tmp_path / "a.gguf", tmp_path / "b.gguf", T.F32, overrides=[("*", T.F32)])
    want = dequantize(blocks, T.Q8_0, (64, 3))
    assert torch.equal(GGUFFile(tmp_path / "b.gguf").tensor("conv.weight"), want)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from quant.convert import Options, convert
from quant.plan import make_plan
from quant.recipes import recipe_named
from quant.sources import open_source

def wait(done, total, name):
    if done > total // 2:
        print("half way", flush=True)
        time.sleep(60)

plan = make_plan(open_source(sys.argv[2]), recipe_named("flash-8"))
convert(plan, sys.argv[3], options=Options(progress=wait))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("before", [None, b"old"], ids=["new", "old"])
def test_kill_leaves_the_old_file_and_the_next_run_cleans_up(tmp_path, source, before):
    target = tmp_path / "a.gguf"
    if before is not None:
        target.write_bytes(before)
    command = [sys.executable, "-c", KILLED, ROOT, source[0], target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half way\n"
        process.kill()
    assert (target.read_bytes() if target.exists() else None) == before
    (orphan,) = tmp_path.glob(".a.gguf.*.tmp")
    assert orphan.stat().st_size > 10_000
    make(source[0], target, "flash-8")
    assert orphan.exists()  # too fresh to be sure of
    os.utime(orphan, (1e9, 1e9))
    mine = tmp_path / f".a.gguf.{os.getpid()}-0123abcd.tmp"
    mine.write_bytes(b"of a process that lives")
    os.utime(mine, (1e9, 1e9))
    make(source[0], target, "flash-8")
    assert not orphan.exists() and mine.exists()
    assert GGUFFile(target).architecture == "sd3"


MEASURED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import quant.__main__
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = quant.__main__.main(["convert", sys.argv[2], sys.argv[3], "--type", sys.argv[4], "--json"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no getrusage")
@pytest.mark.parametrize(("qtype", "count"), [("Q8_0", 12), ("Q4_K", 6)])
def test_memory_stays_within_a_gigabyte_of_the_largest_tensor(tmp_path, qtype, count):
    """`count` x 268 MB of bf16, zeros but for a row each, so that the disk holds little of it."""
    rows, cols = 16384, 8192
    size = rows * cols * 2
    entries = {f"blk.{i}.weight": ("BF16", (rows, cols), i * size, (i + 1) * size)
               for i in range(count)}  # fmt: skip
    path = tmp_path / "a.safetensors"
    models.header_only(path, entries)
    start = path.stat().st_size
    os.truncate(path, start + count * size)
    with open(path, "rb+") as file:
        for i in range(count):
            file.seek(start + i * size)
            file.write(torch.randn(cols).bfloat16().view(torch.uint8).numpy().tobytes())
    command = [sys.executable, "-c", MEASURED, ROOT, path, tmp_path / "a.gguf", qtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(done.stderr.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    assert grown < size + 2**29  # half of what is promised


def test_errors_of_huge_and_of_nonfinite_weights():
    errors = Errors()
    errors.add(
        torch.tensor([3e38, 1.0, float("nan"), 2.0]), torch.tensor([1e38, 1.0, 1.0, -torch.inf])
    )
    assert (errors.count, errors.nonfinite) == (2, 2)
    assert errors.rmse == pytest.approx(2e38 / 2**0.5, rel=1e-5)
    assert errors.relative == pytest.approx(2 / 3, rel=1e-5) and errors.cosine == pytest.approx(1)
    errors.add(torch.zeros(0), torch.zeros(0))
    assert Errors().relative == 0 and Errors().cosine == 1 and errors.count == 2
