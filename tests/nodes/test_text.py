"""FewStepTextEncode against the host's own text nodes, on tiny encoders of the host's classes."""

import comfy.hooks
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from comfy_extras.nodes_sd3 import CLIPTextEncodeSD3
from fewstep.flow import Preset
from fewstep.nodes.text import FewStepTextEncode
from fewstep.tests.host import tiny
from safetensors.torch import save_file

import nodes

PROMPT = "a (red:1.4) circle, [blue] \\(flat\\) background"
LONG = "a red circle on a blue background, " * 20  # three times 77 CLIP tokens


@pytest.fixture(scope="module")
def full():
    return tiny.sd3_clip("l", "g", "t5")


@pytest.fixture(scope="module")
def clips_only():
    return tiny.sd3_clip("l", "g")


def encode(clip, text=PROMPT, t5="auto", **inputs):
    (conditioning,) = FewStepTextEncode.execute(clip, text, t5, **inputs).args
    return conditioning


def stock(clip, text=PROMPT):
    (conditioning,) = nodes.CLIPTextEncode().encode(clip, text)
    return conditioning


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for (cond, extra), (cond_stock, extra_stock) in zip(ours, theirs, strict=True):
        assert torch.equal(cond, cond_stock)
        assert extra.keys() == extra_stock.keys()
        assert torch.equal(extra["pooled_output"], extra_stock["pooled_output"])


@pytest.mark.parametrize("encoders", [("l", "g", "t5"), ("l", "t5"), ("t5",), ("g",), ("l",)])
@pytest.mark.parametrize("text", ["", PROMPT, LONG])
def test_auto_is_the_hosts_own_encoding(encoders, text):
    clip = tiny.sd3_clip(*encoders)
    assert_same(encode(clip, text), stock(clip, text))


@pytest.mark.parametrize("build", [tiny.flux_clip, tiny.sdxl_clip])
def test_other_families_encode_as_ever(build):
    clip = build()
    for t5 in ("auto", "encode"):
        assert_same(encode(clip, t5=t5), stock(clip))


@pytest.mark.parametrize("text", [PROMPT, LONG])
def test_omit_is_a_clip_without_t5(full, clips_only, text):
    assert_same(encode(full, text, "omit"), stock(clips_only, text))


@pytest.mark.parametrize("t5, runs", [("encode", 1), ("omit", 0), ("zeros77", 0), ("zeros256", 0)])
def test_t5_runs_only_to_encode(full, t5, runs):
    calls = []
    hook = full.cond_stage_model.t5xxl.register_forward_pre_hook(lambda *_: calls.append(1))
    encode(full, t5=t5)
    hook.remove()
    assert len(calls) == runs


@pytest.mark.parametrize("t5, tokens", [("zeros77", 77), ("zeros256", 256)])
def test_zeros_follow_the_clip_tokens(full, clips_only, t5, tokens):
    ((cond, extra),) = encode(full, t5=t5)
    ((cond_stock, extra_stock),) = stock(clips_only)
    assert cond.shape == (1, 77 + tokens, 4096) and cond.dtype == cond_stock.dtype
    assert torch.equal(cond[:, :77], cond_stock)
    assert not cond[:, 77:].any()
    assert torch.equal(extra["pooled_output"], extra_stock["pooled_output"])
    assert_same(encode(clips_only, t5=t5), [[cond, extra]])  # loaded or not


def test_the_shared_clip_is_left_as_it_was(full):
    before = stock(full)
    encode(full, t5="omit")
    assert full.cond_stage_model.t5xxl is not None
    assert_same(stock(full), before)


@pytest.mark.parametrize("t5, length", [("auto", 154), ("omit", 77), ("zeros256", 333)])
def test_auto_asks_the_models_file(full, t5, length):
    model = FakeModel(Preset("mine", "Mine", 2, rows=((1, 0.5, 0),), t5=t5))
    assert encode(full, model=model)[0][0].shape[1] == length
    assert encode(full, t5="zeros77", model=model)[0][0].shape[1] == 154  # by hand wins
    assert encode(full, model=FakeModel(None))[0][0].shape[1] == 154


class FakeModel:
    """Of a MODEL, the text node reads only the attachment."""

    def __init__(self, preset):
        self.preset = preset

    def get_attachment(self, name):
        assert name == "fewstep"
        return self.preset


def test_a_text_of_its_own_for_t5(full):
    (theirs,) = CLIPTextEncodeSD3.execute(full, PROMPT, PROMPT, "a whole sentence.", "none").args
    assert_same(encode(full, t5_text="a whole sentence."), theirs)
    with pytest.raises(AssertionError):
        assert_same(encode(full), theirs)


def test_embeddings_are_honoured(tmp_path):
    widths = {"clip_l": tiny.L_WIDTH, "clip_g": tiny.G_WIDTH, "t5xxl": 4096}
    save_file({k: torch.ones(2, w) for k, w in widths.items()}, tmp_path / "glow.safetensors")
    clip = tiny.sd3_clip("l", "g", "t5", embeddings=str(tmp_path))
    text = "a circle embedding:glow"
    assert_same(encode(clip, text), stock(clip, text))
    assert not torch.equal(encode(clip, text, "omit")[0][0], encode(clip, "a circle", "omit")[0][0])


def hooked(clip):
    """The CLIP with a LoRA hook on CLIP-L that goes from strength 0 to 1 half-way, scheduled."""
    name = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_{}.weight"
    lora = {name.format("up"): torch.ones(64, 1), name.format("down"): torch.ones(1, tiny.L_WIDTH)}
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 1.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(0.0, 0.0))
    keyframes.add(comfy.hooks.HookKeyframe(1.0, 0.5))
    hooks.set_keyframes_on_hooks(keyframes)
    (clip,) = SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=True, hooks=hooks)
    return clip


@pytest.mark.parametrize("t5", ["encode", "omit", "zeros77"])
def test_hooks_and_their_schedule_work(full, clips_only, t5):
    ours = encode(hooked(full), t5=t5)
    theirs = stock(hooked(full if t5 == "encode" else clips_only))
    assert len(ours) == 2
    assert not torch.equal(ours[0][0], ours[1][0])  # the hook did something
    if t5 == "zeros77":
        ours = [[cond[:, :77], extra] for cond, extra in ours]
    assert_same(ours, theirs)
    assert [extra["clip_start_percent"] for _, extra in ours] == [0.0, 0.5]


@pytest.mark.parametrize(
    "encoders, t5, said",
    [
        (("l", "g"), "encode", "has no T5.*Load a T5-XXL file in FewStep Load Text Encoders"),
        (("t5",), "omit", "nobody would read the text.*Load a CLIP-L or CLIP-G"),
        (("t5",), "zeros256", "nobody would read the text"),
        ("flux", "omit", "for SD3's text encoders.*FluxClipModel.*Set t5 to 'auto'"),
    ],
)
def test_what_cannot_be_done_names_the_remedy(encoders, t5, said):
    clip = tiny.flux_clip() if encoders == "flux" else tiny.sd3_clip(*encoders)
    with pytest.raises(ValueError, match=said):
        encode(clip, t5=t5)


def test_t5_text_counts_only_where_t5_reads(full):
    clip = tiny.sd3_clip("l")
    assert_same(encode(clip, t5_text="a sentence"), encode(clip))
    assert_same(encode(full, t5="omit", t5_text="a sentence"), encode(full, t5="omit"))
    with pytest.raises(ValueError, match="has no T5 to read a text of its own: clear it"):
        encode(tiny.sdxl_clip(), t5_text="a sentence")


def test_no_clip_says_what_to_load():
    with pytest.raises(ValueError, match=r"The CLIP is empty: .*FewStep Load Text Encoders"):
        encode(None)
