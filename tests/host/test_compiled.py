"""The stock node *TorchCompileModel* on GGUF models: one graph, made once."""

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from fewstep.host import loading
from fewstep.tests.host import toys
from fewstep.tests.host.test_cpu import bfloat16  # noqa: F401  a fixture
from fewstep.tests.host.test_hooks import draw, hook, keyframed  # noqa: F401  a fixture
from fewstep.tests.host.test_loading import sample
from fewstep.tests.host.test_lora import load, lokr, low_rank
from gguf import GGMLQuantizationType as T
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def forgotten():
    """Graphs of other tests; and what was counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def load_model(path, qtype=T.Q8_0, depth=2, **options):
    toys.write(path, "sd3", toys.mmdit(depth), qtype)
    return loading.load_diffusion_model(str(path), **options)


def compiled(model):
    """By the stock node, with a backend that needs no compiler of C++."""
    return TorchCompileModel.execute(model, "aot_eager").args[0]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("qtype, depth", [(T.Q8_0, 2), (T.Q4_K, 4), (T.IQ2_XXS, 4)])
def test_the_whole_model_is_one_graph_and_draws_the_same(bfloat16, tmp_path, qtype, depth):  # noqa: F811
    model = load_model(tmp_path / "m.gguf", qtype, depth)
    drawn = sample(compiled(model))  # compiled before anything was drawn
    assert graphs() == 1 and not counters["graph_break"]
    assert torch.equal(drawn, sample(model))


@pytest.mark.parametrize("memory", ["low", "2 GB"])
def test_nothing_that_changes_between_pictures_compiles_it_again(bfloat16, hook, tmp_path, memory):  # noqa: F811
    model = load_model(tmp_path / "m.gguf", memory=memory)
    held = keyframed(hook(low_rank(seed=5)), (0.0, 1.0), (0.5, 0.5))
    wanted = {
        "plain": draw(model),
        "LoRA": draw(load(model, low_rank())),
        "weaker": draw(load(model, low_rank(), 0.5)),
        "another": draw(load(load(model, low_rank()), low_rank(8, seed=3))),
        "dense": draw(load(model, lokr())),
        "hook": draw(model, held, held),  # on both, so that they run as one batch
        "prompt": draw(model, seed=7),
    }
    draw(compiled(model))
    first = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = {
            "plain": draw(compiled(model)),
            "LoRA": draw(compiled(load(model, low_rank()))),
            "weaker": draw(compiled(load(model, low_rank(), 0.5))),
            "another": draw(compiled(load(load(model, low_rank()), low_rank(8, seed=3)))),
            "dense": draw(compiled(load(model, lokr()))),
            "hook": draw(compiled(model), held, held),
            "prompt": draw(compiled(model), seed=7),
        }
    for what, drawn in got.items():
        assert torch.equal(drawn, wanted[what]), what
    assert first == graphs() == 1


def test_partly_loaded_it_is_the_same_graph(bfloat16, tmp_path):  # noqa: F811
    model = load_model(tmp_path / "m.gguf")
    network = torch.compile(model.model.diffusion_model, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 16, 8, 8)
    options = {"context": torch.randn(1, 77, 4096), "y": torch.randn(1, 2048)}
    options["transformer_options"] = model.model_options["transformer_options"]

    def forward():
        with torch.inference_mode():
            return network(x, torch.ones(1) * 500, **options)

    patched, drawn = load(model, low_rank()), []
    for memory in (0, 1, model.model_size() // 2):
        patched.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
        drawn.append(forward())
        patched.detach()
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=2**-7, atol=2**-7)


def test_blocks_compiled_one_by_one_share_a_graph(bfloat16, tmp_path):  # noqa: F811
    model = load_model(tmp_path / "m.gguf", depth=4)
    layers = [block.x_block.mlp for block in model.model.diffusion_model.joint_blocks]
    x = torch.randn(1, 7, 256)
    assert len(layers) == 4
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        for mlp in layers:
            run = torch.compile(mlp, backend="aot_eager", fullgraph=True)
            assert torch.equal(run(x), mlp(x))
    assert graphs() == 1


def test_int8_products_are_in_the_graph_too(bfloat16, tmp_path):  # noqa: F811
    model = load_model(tmp_path / "m.gguf", runtime="int8")
    reference = comfy.sd.load_diffusion_model_state_dict(toys.mmdit())
    drawn = sample(compiled(model))
    assert graphs() == 1 and torch.equal(drawn, sample(model))
    assert (drawn - sample(reference)).norm() < 0.1 * drawn.norm()


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="an older torch")
def test_no_cuda_graph_takes_a_layer_in():
    assert torch.Tag.cudagraph_unsafe in torch.ops.fewstep.linear.default.tags
