"""llama.cpp's importance files, and what they change in a conversion."""

import pytest
import torch
from fewstep.quant import GGUFError, GGUFFile, dequantize, quantize, write_gguf
from fewstep.quant.convert import Options, convert
from fewstep.quant.importance import read_importance
from fewstep.quant.plan import make_plan
from fewstep.quant.recipes import recipe_of_type
from fewstep.quant.sources import open_source
from fewstep.tests.quant import models
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file

NAME = "joint_blocks.0.x_block.attn.qkv.weight"


def write(path, sums, counts, name=NAME):
    tensors = [(name + ".in_sum2", sums), (name + ".counts", counts)]
    write_gguf(path, "imatrix", {"general.type": "imatrix"}, tensors)
    return path


def test_mean_square_of_each_input(tmp_path):
    sums = torch.rand(1, 256) * 100
    got = read_importance(write(tmp_path / "i.gguf", sums, torch.tensor([[40.0]])))
    assert torch.equal(got[NAME], sums[0] / 40)
    path = write(tmp_path / "j.gguf", sums, torch.zeros(1, 1), "model.diffusion_model." + NAME)
    assert torch.equal(read_importance(path)[NAME], torch.ones(256))


def test_inputs_that_were_always_zero_keep_their_weights(tmp_path):
    """ggml's searches write a block as 0 whose weights all count nothing."""
    sums = torch.rand(1, 512)
    sums[:, :256] = 0
    x = torch.randn(8, 512)
    weight = read_importance(write(tmp_path / "i.gguf", sums, torch.ones(1, 1)))[NAME]
    assert torch.equal(weight[256:], sums[0, 256:]) and (weight[:256] > 0).all()
    for qtype in (T.Q4_K, T.IQ4_XS, T.Q4_0):
        y = dequantize(quantize(x, qtype, weight), qtype, tuple(x.shape))
        assert (x - y)[:, :256].norm() < 0.1 * x[:, :256].norm()
    path = write(tmp_path / "j.gguf", torch.zeros(1, 512), torch.ones(1, 1))
    assert torch.equal(read_importance(path)[NAME], torch.ones(512))


def test_it_is_used_for_its_tensor_only(tmp_path):
    state_dict = models.sd3()
    save_file(state_dict, tmp_path / "m.safetensors")
    plan = make_plan(open_source(tmp_path / "m.safetensors"), recipe_of_type(T.Q4_0))
    importance = {NAME: torch.rand(256)}
    convert(plan, tmp_path / "a.gguf", options=Options(importance=importance))
    file = GGUFFile(tmp_path / "a.gguf")
    other = NAME.replace("x_block", "context_block")
    for name, given in ((NAME, importance[NAME]), (other, None)):
        assert torch.equal(file.blocks(name), quantize(state_dict[name].float(), T.Q4_0, given))
    for wrong, message in (
        ({"x": torch.ones(256)}, "names none"),
        ({NAME: torch.ones(9)}, "of 256"),
    ):
        with pytest.raises(GGUFError, match=message):
            convert(plan, tmp_path / "b.gguf", options=Options(importance=wrong))


def test_bad_files_are_told(tmp_path):
    write_gguf(tmp_path / "a.gguf", "sd3", {}, [("a", torch.ones(1))])
    with pytest.raises(GGUFError, match="no importance file"):
        read_importance(tmp_path / "a.gguf")
    with pytest.raises(GGUFError, match="bad values"):
        read_importance(write(tmp_path / "b.gguf", torch.full((1, 4), -1.0), torch.ones(1, 1)))
    with pytest.raises(GGUFError, match="counts has bad values"):
        read_importance(write(tmp_path / "b.gguf", torch.ones(1, 4), torch.full((1, 1), -1.0)))
    with pytest.raises(GGUFError, match="do not fit"):
        read_importance(write(tmp_path / "c.gguf", torch.ones(1, 4), torch.ones(3, 1)))
