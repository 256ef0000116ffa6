"""Text to CONDITIONING with T5 used, left out, or replaced by zeros.

SD3 was trained to do without T5, but its absence looks different in each program: ComfyUI leaves
the T5 tokens out (77 CLIP tokens remain), diffusers puts 77 or 256 zero tokens in their place, as
in training. The model's `context_embedder` has a bias, so zero tokens are not the same as none.
"""

import torch
from comfy.text_encoders.sd3_clip import SD3ClipModel

ZEROS = {"zeros77": 77, "zeros256": 256}
LOAD_T5 = "Load a T5-XXL file in FewStep Load Text Encoders, or set t5 to 'omit' or 'zeros256'."


def encode(clip, text: str, t5_text: str = "", t5: str = "auto", preset=None) -> list:
    """Prompt -> CONDITIONING, by the host's own encoding (weights, embeddings, hooks, schedules).

    t5: a mode of `flow.T5_MODES`; "auto" is the preset's, else T5 where it is loaded, else left
    out. `t5_text`, unless empty, is what T5 reads instead of `text`, where it does.
    Raises: ValueError naming the remedy.
    """
    if clip is None:
        raise ValueError(
            "The CLIP is empty: the checkpoint that it comes from has no text encoder. Load the "
            "encoders' own files with FewStep Load Text Encoders."
        )
    mode = choose_mode(clip, t5, preset)
    tokens = clip.tokenize(text)
    if mode != "encode":
        conditioning = without_t5(clip).encode_from_tokens_scheduled(tokens)
        return [[append_zeros(cond, ZEROS.get(mode, 0)), extra] for cond, extra in conditioning]
    if t5_text:
        if "t5xxl" not in tokens:
            raise ValueError("This kind of CLIP has no T5 to read a text of its own: clear it.")
        tokens["t5xxl"] = clip.tokenize(t5_text)["t5xxl"]
    return clip.encode_from_tokens_scheduled(tokens)


def choose_mode(clip, t5: str, preset=None) -> str:
    """A mode other than "auto" that this CLIP can do. Raises: ValueError naming the remedy."""
    encoder = clip.cond_stage_model
    if not isinstance(encoder, SD3ClipModel):
        if t5 in ("auto", "encode"):
            return "encode"
        raise ValueError(
            f"t5 '{t5}' is for SD3's text encoders, which may lack T5; this CLIP is of another "
            f"kind ({type(encoder).__name__}). Set t5 to 'auto'."
        )
    if t5 == "auto" and preset is not None:
        t5 = preset.t5
    if t5 == "auto":
        t5 = "omit" if encoder.t5xxl is None else "encode"
    if t5 == "encode" and encoder.t5xxl is None:
        raise ValueError(f"t5 is 'encode', but this CLIP has no T5. {LOAD_T5}")
    if t5 != "encode" and encoder.clip_l is None and encoder.clip_g is None:
        raise ValueError(
            f"t5 is '{t5}', but this CLIP has nothing besides T5, so nobody would read the text. "
            f"Load a CLIP-L or CLIP-G file too, or set t5 to 'encode'."
        )
    return t5


def without_t5(clip):
    """A clone of an SD3 CLIP whose T5 does not run; all weights and patches are shared."""
    encoder = clip.cond_stage_model
    rest = SD3ClipModel(clip_l=False, clip_g=False, t5=False)
    rest.clip_l, rest.clip_g, rest.dtypes = encoder.clip_l, encoder.clip_g, encoder.dtypes
    clip = clip.clone()
    clip.cond_stage_model = rest
    return clip


def append_zeros(cond: torch.Tensor, tokens: int) -> torch.Tensor:
    """`cond` (batch, n, width) with `tokens` zero tokens after it."""
    return torch.nn.functional.pad(cond, (0, 0, 0, tokens))
