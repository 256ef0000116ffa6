"""ComfyUI's own networks as trainable torch modules: MMDiT, CLIP text model, T5, TAESD.

Training the very modules that will run leaves no second formulation to keep in step. They are built
on plain `torch.nn` operations, without the host's casting. ComfyUI must be importable.
"""

from functools import cache
from types import SimpleNamespace

import torch
from comfy import clip_model, sd1_clip
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules import mmdit
from comfy.taesd import taesd
from comfy.text_encoders import t5
from torch import Tensor, nn

CONTEXT_WIDTH = 4096  # SD3's: T5-XXL's width, to which CLIP's tokens are padded
CLIP_G_POOLED = 1280  # the part of the pooled vector that is zero without CLIP-G
TOKENS = 77
VAE_SCALE, VAE_SHIFT = 1.5305, 0.0609  # comfy.latent_formats.SD3


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **_
) -> Tensor:
    """The host's attention on (n, tokens, heads·width), by what trains fastest on the device.

    On CPUs torch's fused kernel takes three times as long, backward, as three plain operations.
    """
    if q.device.type != "cpu":
        v = v.flatten(2)  # MMDiT leaves the heads of v apart
        return attention_pytorch(q, k, v, heads, mask=None if mask is None else mask.to(q.dtype))
    q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


_TRAINING_OPTIONS = {
    "optimized_attention_override": lambda _, *args, **kwargs: attention(*args, **kwargs)
}


class ZeroPaddedLinear(nn.Linear):
    """A linear layer that takes a narrower input as though it were padded with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.in_features:
            return super().forward(x)
        return nn.functional.linear(x, self.weight[:, : x.shape[-1]], self.bias)


def build_mmdit(depth: int, pooled_width: int, pos_embed_max_size: int = 16) -> nn.Module:
    """An SD3 MMDiT, hidden width 64·depth, as `comfy.model_detection` would configure it.

    Its position table is centred: the host crops the middle for pictures of any smaller size.
    """
    hidden = 64 * depth
    params = {"in_features": CONTEXT_WIDTH, "out_features": hidden}
    model = mmdit.OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        depth=depth,
        adm_in_channels=pooled_width + CLIP_G_POOLED,
        context_embedder_config={"target": "torch.nn.Linear", "params": params},
        num_patches=pos_embed_max_size**2,
        pos_embed_max_size=pos_embed_max_size,
        qk_norm="rms",
        x_block_self_attn_layers=[],
        operations=SimpleNamespace(**vars(nn) | {"Linear": ZeroPaddedLinear}),
    )
    table = mmdit.get_2d_sincos_pos_embed(hidden, pos_embed_max_size)
    model.pos_embed.copy_(torch.from_numpy(table))
    return _initialise_mmdit(model, pooled_width)


def _initialise_mmdit(model: nn.Module, text_width: int) -> nn.Module:
    """DiT's start: Xavier weights, every block the identity, a velocity of zero."""
    for name, module in model.named_modules():
        if isinstance(module, mmdit.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
            if "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
    for embedder in (model.t_embedder, model.y_embedder):
        for layer in (embedder.mlp[0], embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
    # Columns that only ever meet the padding would never learn: they are zero from the start.
    for layer in (model.context_embedder, model.y_embedder.mlp[0]):
        nn.init.normal_(layer.weight[:, :text_width], std=text_width**-0.5)
        nn.init.zeros_(layer.weight[:, text_width:])
    return model


def velocity(model: nn.Module, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """The model's velocity (n, 16, h, w) at noise level sigma (n,).

    context (n, tokens, width) and pooled (n, width) come from CLIP-L alone; the zeros with which
    the host pads them are implied (see ZeroPaddedLinear).
    """
    return model(x, 1000 * sigma, context, pooled, transformer_options=_TRAINING_OPTIONS)


def build_text_model(width: int, layers: int, heads: int) -> nn.Module:
    """A CLIP-L-shaped text model without its token table: tokens arrive as embeddings."""
    config = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": TOKENS,
        "eos_token_id": 49407,
    }
    tiny_table = SimpleNamespace(**vars(nn) | {"Embedding": _position_table})
    model = clip_model.CLIPTextModel(config, None, None, tiny_table)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.02)
    nn.init.eye_(model.text_projection.weight)
    model.text_projection.requires_grad_(False)  # SD3 takes the pooled token before it
    return model


def _position_table(rows: int, width: int, **kwargs) -> nn.Embedding:
    return nn.Embedding(rows if rows == TOKENS else 0, width, **kwargs)


def encode_text(model: nn.Module, embeds: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Context and pooled vector as SD3 takes them from CLIP-L, differentiably.

    embeds (n, tokens, width); last (n,) is the place of the end token. Context is the penultimate
    layer's (n, tokens, width), pooled the end token's (n, width) after the final norm.
    The host's own forward adds in place, which autograd refuses: here its layers are called one by
    one, and their parts added out of place.
    Source: comfy.clip_model CLIPTextModel_, CLIPEncoder, CLIPLayer.
    """
    text = model.text_model
    tokens = embeds.shape[1]
    x = embeds + text.embeddings.position_embedding.weight[:tokens]
    mask = torch.full((tokens, tokens), float("-inf"), device=x.device).triu_(1)
    hidden = []
    for layer in text.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention)
        x = x + layer.mlp(layer.layer_norm2(x))
        hidden.append(x)
    pooled = text.final_layer_norm(x)[torch.arange(len(x), device=x.device), last]
    return hidden[-2], pooled


class _Embedding(nn.Embedding):
    """Takes the type that the host's T5 asks of its tables' rows."""

    def forward(self, ids: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return super().forward(ids).to(out_dtype)


# Words that the heads of a new T5 look at first, by how far ahead they are.
NEIGHBOURS = ((-1,), (1,), (-2,), (2,), (-3,), (-4,), tuple(range(-8, 0)), tuple(range(1, 9)))


def build_t5(
    pieces: int, layers: int, heads: int, head_width: int, feed_forward: int, width=CONTEXT_WIDTH
) -> nn.Module:
    """A T5 v1.1 encoder, cut short: as wide as SD3's, but of few layers, heads and pieces.

    Its residual stream starts with T5's own deviations (unscaled attention), and its heads look at
    their NEIGHBOURS: where a word stands is all in the attention's bias, which learns slowly.
    """
    config = {
        "d_model": width,
        "num_layers": layers,
        "num_heads": heads,
        "d_kv": head_width,
        "d_ff": feed_forward,
        "vocab_size": pieces,
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
        "model_type": "t5",
    }
    model = t5.T5(config, None, None, SimpleNamespace(**vars(nn) | {"Embedding": _Embedding}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if name.endswith("SelfAttention.q.weight"):
            parameter.data.mul_(head_width**-0.5)
    nn.init.normal_(model.shared.weight)
    _look_at_neighbours(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias)
    return model


@torch.no_grad()
def _look_at_neighbours(bias: nn.Module, strength: float = 8.0) -> None:
    """Let each head of T5's relative bias (32 buckets, heads) prefer one of NEIGHBOURS, so much
    that the padding of a short prompt to 77 tokens does not outweigh them.

    Bucket 0 to 7 are offsets 0 to −7, bucket 8 is −8 and a few before it; 16 more is as far ahead.
    Source: comfy.text_encoders.t5 T5Attention._relative_position_bucket.
    """
    nn.init.zeros_(bias.weight)
    for head in range(bias.weight.shape[1]):
        for offset in NEIGHBOURS[head % len(NEIGHBOURS)]:
            bias.weight[abs(offset) + 16 * (offset > 0), head] = strength


def encode_t5(model: nn.Module, ids: Tensor) -> Tensor:
    """Context (n, tokens, width) of T5 ids (n, tokens), differentiably; padding is not masked.

    The host's own forward adds in place: its layers are called one by one here (see encode_text).
    Source: comfy.text_encoders.t5 T5Stack, T5Block.
    """
    x, bias = nn.functional.embedding(ids, model.shared.weight), None
    for block in model.encoder.block:
        first, second = block.layer
        out, bias = first.SelfAttention(first.layer_norm(x), None, bias, attention)
        x = x + out
        x = x + second.DenseReluDense(second.layer_norm(x))
    return model.encoder.final_layer_norm(x)


def build_taesd(decoder_gain: float = 1.0) -> nn.Module:
    """A 16-channel TAESD (TAESD3's shape), initialised for training.

    Its decoder sees SD3's model-space latents times `decoder_gain`; TAESD's clamp at ±3 asks for a
    gain below 1 where latents have long tails.
    """
    model = taesd.TAESD(latent_channels=16)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, taesd.Block):
            module.conv[4].weight.data.mul_(0.2)  # there is no norm: residuals start small
    model.vae_scale.data.fill_(VAE_SCALE * decoder_gain)
    model.vae_shift.data.fill_(VAE_SHIFT)
    return model


@cache
def _clip_tokenizer() -> sd1_clip.SDTokenizer:
    return sd1_clip.SDTokenizer()


@cache
def token_ids(word: str) -> tuple[int, ...]:
    """The CLIP token ids of a word."""
    return tuple(_clip_tokenizer().tokenizer(word)["input_ids"][1:-1])


def tokenize(text: str) -> list[int]:
    """77 CLIP token ids of a prompt of plain words: start, words, end, and end as padding."""
    ids = [id for word in text.split() for id in token_ids(word)][: TOKENS - 2]
    return [49406, *ids] + [49407] * (TOKENS - 1 - len(ids))
