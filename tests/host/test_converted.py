"""What `python -m quant convert` makes of a published file, loaded by us: the model that it was."""

import comfy.sd
import pytest
import torch
from fewstep.host import loading
from fewstep.quant.convert import Options, convert
from fewstep.quant.plan import make_plan
from fewstep.quant.recipes import recipe_of_type
from fewstep.quant.sources import open_source
from fewstep.tests.host import published
from gguf import GGMLQuantizationType as T

SCHEDULE = {"fewstep.sigmas.2": [1.0, 0.5, 0.0]}  # a list, beside which Wan's shapes are folded


@pytest.fixture
def converted(tmp_path):
    """converted(shapes, …) -> (the safetensors file, the GGUF file in bf16)."""

    def make(shapes, metadata=None, **options):
        source = published.write(tmp_path / "model.safetensors", shapes)
        plan = make_plan(open_source(source), recipe_of_type(T.BF16), **options)
        convert(plan, tmp_path / "model.gguf", metadata, Options(measure=False))
        return str(source), str(tmp_path / "model.gguf")

    return make


def assert_equal(ours, theirs):
    """The same weights under the same names, whatever floats hold them."""
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


def weights(model):
    return model.model.diffusion_model.state_dict()


@pytest.mark.parametrize("metadata", [None, SCHEDULE], ids=["plain", "schedule"])
@pytest.mark.parametrize("shapes", [published.sd3, published.flux, published.wan])
def test_a_diffusion_model_is_what_it_was(exact, converted, shapes, metadata):
    source, path = converted(shapes(), metadata)
    reference = comfy.sd.load_diffusion_model(source)
    assert_equal(weights(loading.load_diffusion_model(path)), weights(reference))


def test_a_checkpoint_taken_whole_is_a_diffusion_model(exact, converted):
    parts = {"model.diffusion_model.": published.sd3(), "first_stage_model.": published.tae()}
    shapes = {prefix + name: s for prefix, part in parts.items() for name, s in part.items()}
    source, path = converted(shapes, prefix="")
    reference = comfy.sd.load_diffusion_model(source)
    assert_equal(weights(loading.load_diffusion_model(path)), weights(reference))


def test_a_vae_is_what_it_was(converted):
    source, path = converted(published.vae())
    reference = loading.load_vae(source).first_stage_model
    assert_equal(loading.load_vae(path).first_stage_model.state_dict(), reference.state_dict())
