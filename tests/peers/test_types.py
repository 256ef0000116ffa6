"""Every type and kind of tensor that is written, unpacked by others: the numbers that we read."""

import pytest
import torch
from fewstep.quant import dequantize, quantize, writable_types, write_gguf
from fewstep.tests.quant import models
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file, save_file

METADATA = {"fewstep.version": 1, "fewstep.sigmas.2": [1.0, 0.5, 0.0]}
EVERY_TYPE = pytest.mark.parametrize("qtype", writable_types(), ids=lambda qtype: qtype.name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An SD3 with convolutions of one to three dimensions beside."""
    tensors = models.sd3(depth=1)
    for name, shape in {"1d": (64, 64, 3), "2d": (64, 64, 3, 3), "3d": (64, 16, 1, 2, 2)}.items():
        tensors[f"conv{name}.weight"] = torch.randn(shape).bfloat16()
    path = tmp_path_factory.mktemp("types") / "all.safetensors"
    save_file(tensors, path)
    return path


@EVERY_TYPE
@pytest.mark.parametrize("metadata", [{}, METADATA], ids=["plain", "schedule"])
def test_comfyui_gguf_reads_the_same_numbers(source, make, unpacked, city96, qtype, metadata):
    path = make(source, qtype, metadata)
    ours, theirs = unpacked(path), city96("loader").gguf_sd_loader(str(path))
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        floats = city96("dequant").dequantize_tensor(tensor, torch.float32, torch.float32)
        assert floats.shape == ours[name].shape
        assert torch.equal(torch.Tensor(floats).float(), ours[name])


@EVERY_TYPE
@pytest.mark.parametrize("metadata", [{}, METADATA], ids=["plain", "schedule"])
def test_stable_diffusion_cpp_reads_the_same_numbers(
    source, make, unpacked, cpp, qtype, metadata, tmp_path
):
    """It has them in four dimensions at most, and writes them as float32 or as they are."""
    path, out = make(source, qtype, metadata), tmp_path / "out.safetensors"
    code, log = cpp("convert", str(path), str(out))
    assert code == 0, log
    ours, theirs = unpacked(path), load_file(out)
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert torch.equal(tensor.float().flatten(), ours[name].flatten())


@pytest.mark.parametrize("qtype", [T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K], ids=lambda qtype: qtype.name)
def test_scales_below_zero_are_read_alike(qtype, cpp, tmp_path):
    """Only `effort="high"` writes them, of Q4_K and Q5_K, for weights that lean to one side."""
    x = 0.1 - torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).abs() ** 2 * 0.05
    blocks = quantize(x, qtype, None, "high")
    if qtype in (T.Q4_K, T.Q5_K):
        assert (blocks[:, :4].contiguous().view(torch.float16) < 0).all(1).any()
    write_gguf(tmp_path / "a.gguf", "sd3", {}, [("a.weight", (blocks, qtype, x.shape))])
    code, log = cpp("convert", str(tmp_path / "a.gguf"), str(tmp_path / "a.safetensors"))
    assert code == 0, log
    theirs = load_file(tmp_path / "a.safetensors")["a.weight"]
    assert torch.equal(theirs, dequantize(blocks, qtype, x.shape))
