"""SD3.5-Medium-sized files with random weights: GGUF of a type, and the same unquantised.

Speed does not depend on the values, only on shapes and types; weights are spread as trained ones
are, so that nothing overflows. ComfyUI must be importable (for the shapes).
"""

from functools import partial
from pathlib import Path

import comfy.ops
import gguf
import torch
from comfy.clip_model import CLIPTextModel
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from comfy.taesd.taesd import TAESD
from fewstep.quant import write_gguf
from fewstep.tests.host import toys
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file

POOL = 2**16  # blocks, repeated
SPREAD = 0.02  # standard deviation of the weights
DEPTH, DUAL_BLOCKS, POSITIONS = 24, 13, 384  # SD3.5-Medium's


def shapes() -> dict[str, tuple[int, ...]]:
    model = toys.mmdit_shapes(DEPTH, positions=POSITIONS, dual_blocks=DUAL_BLOCKS)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_blocks(qtype: T) -> torch.Tensor:
    """(POOL, bytes) random blocks of a K-quant; the scales' fields of each are set by hand."""
    generator, size = torch.Generator().manual_seed(0), gguf.GGML_QUANT_SIZES[qtype][1]
    blocks = torch.randint(0, 256, (POOL, size), generator=generator, dtype=torch.uint8)
    if qtype is T.Q6_K:
        scales = torch.randint(-8, 8, (POOL, 16), generator=generator)
        blocks[:, 192:208], halves = scales.to(torch.uint8), {208: SPREAD / 4.6 / 18.5}
    elif qtype is T.Q4_K:  # weights d·scale·q - dmin·min around zero: scale, min < 64, q < 16
        d = SPREAD / 4.6 / 37
        halves = {0: d, 2: 7.5 * d}
    else:
        raise ValueError(f"no random blocks of {qtype.name}: Q6_K and Q4_K are measured")
    for at, value in halves.items():
        half = torch.full((POOL, 1), value, dtype=torch.float16)
        blocks[:, at : at + 2] = half.view(torch.uint8)
    return blocks


def gguf_file(folder: Path, qtype: T) -> Path:
    """The GGUF file, made if it is not there: matrices of `qtype`, the rest F16 and F32."""
    path, block = folder / f"medium-{qtype.name}.gguf", gguf.GGML_QUANT_SIZES[qtype][0]
    if not path.exists():
        pool, tensors = random_blocks(qtype), []
        for name, shape in shapes().items():
            numel = torch.Size(shape).numel()
            if len(shape) == 2 and shape[1] % block == 0:
                tensors.append((name, (partial(_repeat, pool, numel // block), qtype, shape)))
            else:
                dtype = torch.float16 if len(shape) > 1 else torch.float32
                tensors.append((name, torch.full(shape, SPREAD, dtype=dtype)))
        write_gguf(str(path), "sd3", {}, tensors)
    return path


T5 = {"vocabulary": 32128, "width": 4096, "inner": 10240, "heads": 64, "layers": 24}  # XXL's


def t5_file(folder: Path, qtype: T) -> Path:
    """A T5-XXL encoder as llama.cpp writes it, tokenizer and all, made if it is not there."""
    path, block = folder / f"t5-xxl-{qtype.name}.gguf", gguf.GGML_QUANT_SIZES[qtype][0]
    if path.exists():
        return path
    pool, words, width, inner = random_blocks(qtype), T5["vocabulary"], T5["width"], T5["inner"]
    matrices = {"token_embd": (words, width)}
    norms = ["enc.output_norm"]
    for layer in range(T5["layers"]):
        start = f"enc.blk.{layer}."
        matrices |= {f"{start}attn_{name}": (width, width) for name in "qkvo"}
        matrices |= {f"{start}ffn_{name}": (inner, width) for name in ("gate", "up")}
        matrices[start + "ffn_down"] = (width, inner)
        norms += [start + "attn_norm", start + "ffn_norm"]
    tensors = [("enc.blk.0.attn_rel_b.weight", torch.zeros(32, T5["heads"]))]
    tensors += [(f"{name}.weight", torch.full((width,), 0.1)) for name in norms]
    for name, shape in matrices.items():
        blocks = partial(_repeat, pool, shape[0] * shape[1] // block)
        tensors.append((f"{name}.weight", (blocks, qtype, shape)))
    tokenizer = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [f"piece{i}" for i in range(words)],
        "tokenizer.ggml.scores": [-0.5 * i for i in range(words)],
        "tokenizer.ggml.token_type": [1] * words,
    }
    write_gguf(str(path), "t5encoder", tokenizer, tensors)
    return path


def _repeat(pool: torch.Tensor, n: int) -> torch.Tensor:
    return pool.repeat(-(-n // len(pool)), 1)[:n]


def dense_files(folder: Path) -> dict[str, Path]:
    """ "F16": the same shapes unquantised, as checkpoints come; "CLIP-L", "CLIP-G" and "VAE":
    what stable-diffusion.cpp wants beside a diffusion model. Made if they are not there.
    """
    clips = {"CLIP-L": (768, 12, 12, 3072, "quick_gelu"), "CLIP-G": (1280, 32, 20, 5120, "gelu")}
    makers = {name: partial(clip_shapes, *sizes) for name, sizes in clips.items()}
    makers |= {"F16": shapes, "VAE": vae_shapes}
    return {name: _safetensors(folder, name, make) for name, make in makers.items()}


def bfloat16_file(folder: Path) -> Path:
    """The diffusion model in bfloat16, as SD3.5-Medium is published; made if it is not there."""
    return _safetensors(folder, "BF16", shapes, torch.bfloat16)


def vae_file(folder: Path, kind: str) -> Path:
    """SD3's VAE, or its TAESD; made if it is not there."""
    return _safetensors(folder, *{"SD3": ("VAE", vae_shapes), "TAESD": (kind, taesd_shapes)}[kind])


def _safetensors(folder: Path, name: str, make, dtype: torch.dtype = torch.float16) -> Path:
    """A file of random weights, in the shapes that `make()` gives by name."""
    path = folder / f"medium-{name}.safetensors"
    if not path.exists():
        save_file({key: _normal(shape, dtype) for key, shape in make().items()}, path)
    return path


def _normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).normal_(std=SPREAD)


def clip_shapes(width: int, layers: int, heads: int, inner: int, activation: str):
    config = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "hidden_act": activation,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    }
    model = CLIPTextModel(config, torch.float32, "meta", comfy.ops.disable_weight_init)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """SD3's VAE: the host's default one with 16 channels."""
    config = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3}
    config |= {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
    parts = {"encoder": Encoder(**config), "decoder": Decoder(**config)}
    return {
        f"{part}.{name}": tuple(tensor.shape)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def taesd_shapes() -> dict[str, tuple[int, ...]]:
    """As published for SD3."""
    return {name: tuple(p.shape) for name, p in TAESD(latent_channels=16).named_parameters()}
