"""Small models of architectures whose published widths are too large for a test: as the host builds
them, of random weights. What they are is told to the host, which else reads it off the shapes.
"""

import importlib

import comfy.model_detection
import comfy.sd
import torch
from fewstep.tests.host.published import META

_FLUX = {
    "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None,
    "context_in_dim": 64, "hidden_size": 128, "num_heads": 1, "mlp_ratio": 3.0, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [32] * 4, "theta": 2000, "qkv_bias": False,
    "txt_ids_dims": [3],
}  # fmt: skip
_COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "model_channels": 128,
    "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d",
    "use_adaln_lora": True, "adaln_lora_dim": 32, "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0, "rope_enable_fps_modulation": False,
}  # fmt: skip
_LTX = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4}
_LTX |= {"cross_attention_dim": 128, "caption_channels": 64}
_AUDIO = {"audio_attention_head_dim": 32, "audio_num_attention_heads": 4}
_AUDIO |= {"audio_cross_attention_dim": 128, "connector_attention_head_dim": 32}
_AUDIO |= {"connector_num_attention_heads": 4, "audio_connector_attention_head_dim": 32}
_AUDIO |= {"audio_connector_num_attention_heads": 4}
_MASK = {"attention_mask": torch.ones(1, 5).long()}

# the host's name and class, its configuration, a prompt's width and options, a latent's shape
SMALL = {
    # modulations that hide in objects, added in place
    "flux2": (
        "flux2", "flux.model.Flux",
        _FLUX | {"global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
                 "default_ref_method": "index", "ref_index_scale": 10.0, "guidance_embed": False},
        64, {}, (128, 4, 4),
    ),
    "chroma": (
        "chroma", "chroma.model.Chroma",
        _FLUX | {"in_channels": 64, "out_channels": 64, "patch_size": 2, "in_dim": 64,
                 "out_dim": 128, "hidden_dim": 64, "n_layers": 2, "axes_dim": [16, 56, 56],
                 "theta": 10000, "qkv_bias": True, "txt_ids_dims": []},
        64, {}, (16, 8, 8),
    ),
    # in place, in statements too
    "ltxv": ("ltxv", "lightricks.model.LTXVModel", _LTX, 64, _MASK, (128, 2, 4, 4)),
    "ltxav": ("ltxav", "lightricks.av_model.LTXAVModel", _LTX | _AUDIO, 128, _MASK, (128, 2, 4, 4)),
    "pixeldit": (
        "pixeldit_t2i", "pixeldit.model.PixDiT_T2I",
        {"num_groups": 1, "hidden_size": 64, "pixel_hidden_size": 16, "pixel_attn_hidden_size": 64,
         "pixel_num_groups": 1, "patch_depth": 2, "pixel_depth": 1, "txt_embed_dim": 64},
        64, {}, (3, 32, 32),
    ),
    # operations of comfy_kitchen
    "anima": (
        "anima", "anima.model.Anima", _COSMOS, 1024,
        {"t5xxl_ids": torch.arange(6), "t5xxl_weights": torch.ones(6)}, (16, 1, 8, 8),
    ),
    "ernie": (
        "ernie", "ernie.model.ErnieImageModel",
        {"hidden_size": 128, "num_attention_heads": 1, "num_layers": 2, "ffn_hidden_size": 128,
         "text_in_dim": 64},
        64, {}, (128, 4, 4),
    ),
    # prompts in another width than pictures
    "mochi": (
        "mochi_preview", "genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        {"depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 128, "hidden_size_y": 64,
         "mlp_ratio_x": 96.0, "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12,
         "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0,
         "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True,
         "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 64,
         "t5_token_length": 5, "rope_theta": 10000.0},
        64, _MASK, (12, 2, 8, 8),
    ),
}  # fmt: skip


def load(name: str, monkeypatch):
    """MODEL"""
    image_model, path, config, *_ = SMALL[name]
    module, _, kind = f"comfy.ldm.{path}".rpartition(".")
    config = config | {"image_model": image_model}
    network = getattr(importlib.import_module(module), kind)(**config, **META)
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in network.state_dict().items():
        size = 0.7 * value.shape[1] ** -0.5 if value.ndim == 2 else 0.1
        weights[key] = size * torch.randn(value.shape, generator=draw)
        if value.ndim == 1 and "norm" in key and key.endswith(("weight", "scale")):
            weights[key] += 1
    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", lambda *_, **__: dict(config))
    return comfy.sd.load_diffusion_model_state_dict(weights)
