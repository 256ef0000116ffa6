"""A T5 cut short, with a vocabulary of its own, through our loader and the host's own encoding."""

import pytest
import torch
from fewstep.demo import export, recipe
from fewstep.demo.prompts import PIECES, tokenize, tokenize_t5
from fewstep.demo.shipped import load_shipped
from fewstep.distill.model import FlowModel, ModelConfig
from fewstep.host import files, loading, modules, t5, text
from fewstep.quant import GGUFFile
from fewstep.tests.host import toys

TOY = ModelConfig(depth=1, text_width=32, text_heads=2, t5_pieces=len(PIECES), t5_layers=2)
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model and its files as they ship."""
    torch.manual_seed(0)
    model = FlowModel(TOY, recipe.vocabulary()).requires_grad_(False)
    vae = modules.build_taesd().requires_grad_(False)
    folder = tmp_path_factory.mktemp("models")
    return model, dict(zip(export.FILES, export.export(model, vae, TOY, folder), strict=True))


@pytest.fixture(scope="module")
def clip(exported):
    return loading.load_text_encoders([str(exported[1]["t5"]), str(exported[1]["text"])])


@pytest.fixture
def state_dict(exported):
    path = str(exported[1]["t5"])
    return files.rename_text_encoder(path, *files.read(path))


def test_the_host_reads_with_the_files_own_vocabulary(clip):
    for prompt in (PROMPT, "", "two plaid rings", "  red   circle"):
        ids = [id for id, _ in clip.tokenize(prompt)["t5xxl"][0]]
        assert ids == tokenize_t5(prompt)
    assert len(clip.tokenize(PROMPT)["t5xxl"][0]) == 77


def test_the_host_conditions_as_the_trained_model(exported, clip):
    model, _ = exported
    context, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
    mine, mine_pooled = model.encode(tokenize([PROMPT], 2))
    assert context.shape == (1, 154, 4096)
    # 4-bit matrices: T5's tokens have unit deviation, of which they take about a tenth.
    assert (context - mine).square().mean().sqrt() < 0.12
    assert torch.allclose(pooled[:, :32], mine_pooled, atol=0.05)


def test_what_ships_is_read_back(exported):
    model, paths = exported
    back, _ = load_shipped(paths["t5"].parent.parent, TOY, tuple(sorted(recipe.vocabulary())))
    weights = {name: value for name, value in model.state_dict().items() if value.numel()}
    for name, value in weights.items():
        told = back.state_dict()[name].float()
        # Q8_0 keeps a weight within 1/254 of its block's largest; Q4_K within half of a fifteenth
        # of the way from its block's least to its largest, and its scales are 6-bit.
        assert (told - value).abs().max() <= value.float().abs().max() / 12, name


def test_a_new_t5s_heads_look_at_neighbours():
    """Of 40 alike words, each head's attention lies where NEIGHBOURS says, as the host buckets."""
    attention = modules.build_t5(8, 1, 8, 8, 16).encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(40, 40, torch.device("cpu"), torch.float32)[0]
    for head, offsets in enumerate(modules.NEIGHBOURS):
        seen = (bias[head, 20] > 0).nonzero().flatten() - 20
        assert set(offsets) <= set(seen.tolist()), head
        far = 3 if {-8, 8} & set(offsets) else 0  # the host has one bucket for 8 to 11
        assert len(seen) == len(offsets) + far, head
    padded = attention.compute_bias(77, 77, torch.device("cpu"), torch.float32)[0]
    first = padded.softmax(-1)[:, 8]  # the ninth word of a short prompt, of 77 tokens
    for head, offsets in enumerate(modules.NEIGHBOURS):
        assert first[head, [8 + offset for offset in offsets]].sum() > 0.7, head


def test_t5_can_be_left_out(exported, clip):
    ((context, _),) = text.encode(clip, PROMPT, t5="omit")
    mine, _ = exported[0].encode(tokenize([PROMPT], 1))
    assert context.shape == (1, 77, 4096)
    assert torch.allclose(context[..., :32], mine, atol=0.05)


def test_flux_takes_it_too(exported):
    clip = loading.load_text_encoders(
        list(map(str, (exported[1]["text"], exported[1]["t5"]))), "flux"
    )
    tokens = clip.tokenize(PROMPT)["t5xxl"][0]
    assert [id for id, _ in tokens][:8] == tokenize_t5(PROMPT)[:8] and len(tokens) == 256


def test_sizes_are_the_shapes(state_dict):
    assert t5.is_cut(state_dict) and files.kind_of(state_dict) == "text encoder"
    expected = {"num_layers": 2, "num_heads": 2, "d_kv": 32, "d_ff": 64}
    assert t5.sizes("t5.gguf", state_dict) == expected | {"vocab_size": len(PIECES)}


def test_other_t5s_are_left_to_the_host(state_dict):
    narrow = {name: weight[..., :768] for name, weight in state_dict.items() if weight.ndim == 2}
    assert not t5.is_cut({**narrow, t5._QUERY: torch.zeros(64, 768)})
    t5.mark("t5.gguf", state_dict)
    assert not t5.is_cut(state_dict)


@pytest.mark.parametrize("name", ["shared.weight", t5._BIAS])
def test_names_what_is_missing(state_dict, name):
    del state_dict[name]
    with pytest.raises(ValueError, match=rf"t5\.gguf: tensor {name} is missing"):
        t5.sizes("t5.gguf", state_dict)


def test_a_vocabulary_without_a_tokenizer_is_refused(exported, tmp_path):
    file = GGUFFile(str(exported[1]["t5"]))
    tensors = {name: torch.zeros(info.shape) for name, info in file.tensors.items()}
    toys.write(tmp_path / "mute.gguf", "t5encoder", tensors)
    with pytest.raises(ValueError, match=r"mute\.gguf: the T5 has a vocabulary of its own \(38 p"):
        loading.load_text_encoders([str(tmp_path / "mute.gguf"), str(exported[1]["text"])])
