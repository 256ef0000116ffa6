"""The trained model's two text encoders: equal to the host's, and each can be left out."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from comfy import ops
from comfy.text_encoders.t5 import T5
from fewstep.demo import recipe
from fewstep.demo.evaluate import told_by
from fewstep.demo.prompts import PIECES, tokenize, tokenize_t5
from fewstep.distill import model as prompts
from fewstep.distill.dropout import drop_encoders, emptied
from fewstep.distill.model import ABSENT, CLIP, T5_END, T5_PAD, T5_UNKNOWN, FlowModel, empty_prompt
from fewstep.distill.teacher import TeacherConfig, TeacherTask
from fewstep.host import modules

TOY = TeacherConfig(depth=1, text_width=32, text_heads=2, batch=4, t5_pieces=len(PIECES))
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FlowModel(TOY, recipe.vocabulary()).requires_grad_(False)


def without(tokens, encoder):
    tokens = tokens.clone()
    tokens[:, encoder] = ABSENT
    return tokens


def test_t5_equals_the_hosts(model):
    sizes = {"d_model": 4096, "num_layers": 1, "num_heads": 2, "d_kv": 32, "d_ff": 64}
    rest = {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5"}
    config = {**sizes, **rest, "vocab_size": len(PIECES)}
    host = T5(config, torch.float32, None, ops.disable_weight_init)
    host.load_state_dict(model.t5.state_dict())
    ids = torch.tensor([tokenize_t5(PROMPT)])
    mine, theirs = modules.encode_t5(model.t5, ids), host(ids, None)[0]
    assert mine.std() > 0.5 and torch.allclose(mine, theirs, atol=1e-4)


def test_t5_knows_the_words_of_the_grammar_and_no_others():
    words = [PIECES[id] for id in tokenize_t5(PROMPT) if id not in (T5_END, T5_PAD)]
    assert words == [f"▁{word}" for word in PROMPT.split()]
    assert tokenize_t5("a plaid circle")[1:5] == [T5_UNKNOWN, PIECES.index("▁circle"), 1, 0]
    assert len(tokenize_t5("red " * 200)) == 77


def test_t5s_tokens_follow_clips(model):
    tokens = tokenize([PROMPT], 2)
    clip, pooled = model.encode(tokens[:, :1])
    both, same = model.encode(tokens)
    assert both.shape == (1, 154, 4096) and torch.equal(pooled, same)
    assert torch.equal(both[:, :77, :32], clip) and not both[:, :77, 32:].any()
    assert torch.equal(both[:, 77:], modules.encode_t5(model.t5, tokens[:, 1]))


@pytest.mark.parametrize("encoder", [0, 1])
def test_an_absent_encoder_is_zero(model, encoder):
    """Each prompt for itself: the second keeps both."""
    tokens = tokenize([PROMPT] * 2, 2)
    whole, whole_pooled = model.encode(tokens)
    tokens[0] = without(tokens[:1], encoder)
    context, pooled = model.encode(tokens)
    gone = slice(77 * encoder, 77 * encoder + 77)
    assert not context[0, gone].any() and (pooled[0] == 0).all() == (encoder == CLIP)
    whole[0, gone] = 0
    assert torch.equal(context, whole) and torch.equal(pooled[1], whole_pooled[1])


def test_clip_is_left_out_as_the_host_leaves_it_out(model):
    """ComfyUI's SD3 with a T5 alone: its tokens, and zeros for CLIP's pooled vectors."""
    tokens = told_by([PROMPT], "no clip")
    context, pooled = model.encode(tokens)
    assert torch.equal(context, modules.encode_t5(model.t5, tokens[:, prompts.T5]))
    assert pooled.shape == (1, 32) and not pooled.any()
    blank, _ = model.encode(emptied(tokens))
    assert torch.equal(blank, modules.encode_t5(model.t5, tokenize([""], 2)[:, prompts.T5]))


def test_a_prompt_without_both_says_nothing(model):
    context, pooled = model.encode(without(without(tokenize([PROMPT], 2), 0), 1))
    assert not context.any() and not pooled.any()


def test_empty_prompt_is_that_of_both_tokenizers():
    assert torch.equal(empty_prompt(tokenize([PROMPT], 2)), tokenize([""], 2))


def task(**changes):
    config = replace(TOY, **changes)
    code = torch.nn.Identity()
    code.encode = lambda pictures: pictures[:, :1, ::8, ::8].repeat(1, 16, 1, 1)
    data = partial(recipe.training_batch, code, config.batch, encoders=2)
    return TeacherTask(config, recipe.vocabulary(), data)


def test_encoders_are_dropped_independently_and_as_often_as_asked():
    training = task(drop_clip=0.3, drop_t5=0.6)
    tokens = tokenize([PROMPT], 2).repeat(4000, 1, 1)
    dropped = drop_encoders(tokens, training.config, torch.Generator().manual_seed(0))
    absent = (dropped == ABSENT).all(-1).float()
    # 4000 draws: three standard deviations are 0.023
    assert torch.allclose(absent.mean(0), torch.tensor([0.3, 0.6]), atol=0.024)
    assert (absent.prod(1).mean() - 0.18).abs() < 0.024
    assert torch.equal(dropped[absent.sum(1) == 0], tokens[absent.sum(1) == 0])


def test_t5_is_left_out_of_whole_batches():
    training = task(omit_t5=0.5)
    batches = [training._batch(i, torch.Generator().manual_seed(i))[1] for i in range(40)]
    assert {batch.shape[1] for batch in batches} == {1, 2}


def test_learns_with_encoders_missing():
    training = task(drop_clip=0.3, drop_t5=0.3, omit_t5=0.2, warmup=2, full_every=3)
    before = {name: value.clone() for name, value in training.model.t5.state_dict().items()}
    losses = [training.step(i, 0.0).item() for i in range(40)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    for name, value in training.model.t5.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_starts_from_a_model_without_t5():
    old = TeacherTask(replace(TOY, t5_pieces=0), recipe.vocabulary(), None)
    training = task()
    training.start_from(old.ema)
    assert torch.equal(training.model.text.table, old.model.text.table)
    assert torch.equal(training.ema["text.table"], old.ema["text.table"])
    with pytest.raises(ValueError, match=r"lacks mmdit\.pos_embed"):
        training.start_from({k: v for k, v in old.ema.items() if k != "mmdit.pos_embed"})
