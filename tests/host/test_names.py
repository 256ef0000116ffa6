"""Text models with llama.cpp's names: equal to the same model with the host's names."""

import comfy.sd
import pytest
import sentencepiece
import torch
from fewstep.host import files, names
from fewstep.host.layout import is_gguf
from fewstep.host.tokenizer import sentencepiece_model
from fewstep.quant import GGUFFile
from fewstep.tests.host import toys
from gguf import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES
from gguf import GGMLQuantizationType as T

NOT_IN_ENCODERS = {  # tensors that the host computes, or has no place for
    MODEL_TENSOR.ROPE_FREQS,
    MODEL_TENSOR.ATTN_ROT_EMBD,
    MODEL_TENSOR.FFN_GATE_INP,
    MODEL_TENSOR.FFN_GATE_EXP,
    MODEL_TENSOR.FFN_DOWN_EXP,
    MODEL_TENSOR.FFN_UP_EXP,
}


@pytest.mark.parametrize("architecture", ["LLAMA", "QWEN2", "QWEN3", "GEMMA2", "GEMMA3"])
def test_every_tensor_of_the_architecture_has_a_name(architecture):
    arch = MODEL_ARCH[architecture]
    wanted = [t for t in MODEL_TENSORS[arch] if t not in NOT_IN_ENCODERS]
    assert wanted
    for tensor in wanted:
        name = TENSOR_NAMES[tensor].format(bid=7) + ".weight"
        assert names.text_encoder_name(name, architecture.lower()) is not None, name


def test_t5_names_are_the_hosts():
    """Against the state dict of the host's own T5."""
    from comfy.text_encoders.t5 import T5

    config = {
        "d_model": 64,
        "num_heads": 2,
        "d_kv": 32,
        "d_ff": 96,
        "num_layers": 2,
        "vocab_size": 32,
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
        "model_type": "t5",
    }
    wanted = set(T5(config, torch.float32, "meta", comfy.ops.disable_weight_init).state_dict())
    ours = set()
    for tensor in MODEL_TENSORS[MODEL_ARCH.T5]:
        for block in (0, 1):
            name = TENSOR_NAMES[tensor].format(bid=block) + ".weight"
            ours.add(names.text_encoder_name(name, "t5"))
    ours.discard(None)
    assert wanted <= ours
    assert all("encoder.block" in name and "bias" in name for name in ours - wanted - {"lm_head"})


def test_rows_of_a_llama_head_go_back_to_their_places():
    """The inverse of llama.cpp's `LlamaModel.permute`, written out from its source."""
    rows = torch.arange(4 * 8 * 3).reshape(32, 3)
    heads = 4
    permuted = rows.reshape(heads, 2, 32 // heads // 2, 3).swapaxes(1, 2).reshape(32, 3)
    assert torch.equal(names.unpermute_rows(permuted, heads), rows)


def test_quantised_rows_are_moved_as_blocks(tmp_path):
    tensor = torch.randn(64, 32)
    toys.write(tmp_path / "l.gguf", "llama", {"blk.0.attn_k.weight": tensor})
    state_dict, _ = files.read(str(tmp_path / "l.gguf"))
    state_dict["token_embd.weight"] = torch.zeros(4, 32)
    metadata = {"general.architecture": "llama", "llama.attention.head_count_kv": 2}
    renamed = files.rename_text_encoder("l.gguf", state_dict, metadata)
    moved = renamed["model.layers.0.self_attn.k_proj.weight"]
    assert is_gguf(moved)
    expected = names.unpermute_rows(state_dict["blk.0.attn_k.weight"].dequantize(), 2)
    assert torch.equal(moved.dequantize(), expected)
    with pytest.raises(ValueError, match="head_count"):
        files.rename_text_encoder("l.gguf", state_dict, {"general.architecture": "llama"})


def test_gemmas_norms_lose_the_one_that_llama_cpp_added():
    state_dict = {"token_embd.weight": torch.zeros(4, 4), "output_norm.weight": torch.ones(4)}
    renamed = files.rename_text_encoder("g", state_dict, {"general.architecture": "gemma3"})
    assert torch.equal(renamed["model.norm.weight"], torch.zeros(4))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_model_is_put_together_again(tmp_path, kind):
    """A model trained here; its vocabulary written as llama.cpp does, and read from the file."""
    texts = [f"a {c} {s} on a {b} background" for c in ("red", "green") for s in
             ("circle", "square", "star") for b in ("blue", "yellow", "purple")]  # fmt: skip
    prefix = str(tmp_path / kind)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 4),
        model_prefix=prefix,
        model_type=kind,
        vocab_size=300 if kind == "bpe" else 45,
        byte_fallback=kind == "bpe",
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    ids = range(original.get_piece_size())
    types = [
        2 if original.is_unknown(i) else 3 if original.is_control(i) else
        6 if original.is_byte(i) else 1 for i in ids
    ]  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "llama" if kind == "bpe" else "t5",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(original.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }
    toys.write(tmp_path / "t.gguf", "t5", {"x.weight": torch.zeros(4)}, T.F32, metadata)
    proto = sentencepiece_model(GGUFFile(str(tmp_path / "t.gguf")).metadata)
    rebuilt = sentencepiece.SentencePieceProcessor(
        model_proto=proto.numpy().tobytes(), add_eos=True
    )
    for text in ["a red star on a blue background", "two  Greens, £5 of squares", "", "circle"]:
        expected = original.encode(text)
        assert rebuilt.encode(text) == [*expected, original.eos_id()]
        assert rebuilt.decode(expected) == original.decode(expected)
