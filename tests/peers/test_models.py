"""Whole models, converted from the published names and shapes, loaded and run by others.

ComfyUI-GGUF must give what we give; of stable-diffusion.cpp, whose arithmetic is its own, the log
must name no tensor of ours as missing, unknown or of a wrong shape, and the picture must come.
"""

import re

import comfy.model_management
import pytest
import torch
from fewstep.host import loading
from fewstep.tests.host import published
from gguf import GGMLQuantizationType as T

pytestmark = pytest.mark.timeout(3600)  # seconds, for the models in full size
TYPES = pytest.mark.parametrize("qtype", [T.Q8_0, T.Q4_K, T.BF16], ids=lambda qtype: qtype.name)
SLOW = pytest.mark.slow
# shapes, and the sizes of an input: latent, text, pooled text or None
MODELS = {
    "sd3": (published.sd3, (16, 8, 8), 4096, 2048),
    "flux": (published.flux, (16, 8, 8), 4096, 768),
    "wan": (published.wan, (16, 1, 8, 8), 4096, None),
    "qwen_image": (published.qwen_image, (16, 1, 8, 8), 3584, None),
    "z_image": (published.z_image, (16, 8, 8), 2560, None),
    "sdxl": (lambda: published.sdxl((1, 2)), (4, 8, 8), 2048, 2816),
}
LARGE = ("qwen_image", "z_image", "sdxl")  # their sizes are fixed in ComfyUI
BAD = re.compile(r"tensor '(.+)' (not in|has wrong shape in) model file|unknown tensor '(\S+)")


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """write(name, shapes, zeros) -> a safetensors file, written once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def file(name, shapes, zeros=False):
        if name not in made:
            made[name] = published.write(folder / f"{name}.safetensors", shapes(), zeros)
        return made[name]

    return file


@pytest.fixture
def exact(monkeypatch):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "fp32_unet", True)
    monkeypatch.setattr(args, "fp32_text_enc", True)


def denoised(model, latent, text, pooled):
    """One call of the model on noise."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, *latent, generator=g)
    inputs = {"c_crossattn": torch.randn(1, 8, text, generator=g), "num_tokens": 8}
    inputs["guidance"] = torch.tensor([3.5])
    if pooled is not None:
        inputs["y"] = torch.randn(1, pooled, generator=g)
    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode():
        return model.model.apply_model(x, torch.tensor([0.7]), **inputs)


@TYPES
@pytest.mark.parametrize("name", [pytest.param(n, marks=[SLOW] * (n in LARGE)) for n in MODELS])
def test_comfyui_gguf_draws_what_we_draw(exact, write, make, city96, name, qtype):
    import folder_paths

    shapes, *sizes = MODELS[name]
    path = make(write(name, shapes), qtype)
    ours = denoised(loading.load_diffusion_model(str(path)), *sizes)
    folder_paths.add_model_folder_path("unet", str(path.parent))
    model = city96("nodes").UnetLoaderGGUF().load_unet(path.name, "float32")[0]
    assert ours.isfinite().all() and torch.equal(denoised(model, *sizes), ours)
    path.unlink()


def test_comfyui_gguf_takes_the_model_out_of_a_checkpoint(exact, write, make, city96):
    import folder_paths

    shapes, *sizes = MODELS["sd3"]
    parts = {"model.diffusion_model.": shapes(), "first_stage_model.": published.tae()}
    whole = {prefix + name: s for prefix, part in parts.items() for name, s in part.items()}
    path = make(write("checkpoint", lambda: whole), T.Q8_0, prefix="")
    ours = denoised(loading.load_diffusion_model(str(path)), *sizes)
    folder_paths.add_model_folder_path("unet", str(path.parent))
    model = city96("nodes").UnetLoaderGGUF().load_unet(path.name, "float32")[0]
    assert torch.equal(denoised(model, *sizes), ours)


@TYPES
@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5xxl"])
def test_comfyui_gguf_reads_text_encoders(write, make, unpacked, city96, name, qtype):
    """A layer of each, by the names that ComfyUI asks for."""
    shapes = getattr(published, name)(1)
    path = make(write(name, lambda: shapes), qtype)
    read = city96("loader").gguf_clip_loader(str(path))
    assert set(read) == set(shapes) - {"encoder.embed_tokens.weight"}
    ours = sorted(unpacked(path).values(), key=lambda tensor: (tensor.shape, tensor.sum()))
    theirs = [city96("dequant").dequantize_tensor(tensor, torch.float32, torch.float32)
              for tensor in read.values()]  # fmt: skip
    theirs = [torch.Tensor(tensor).float() for tensor in theirs]
    theirs.sort(key=lambda tensor: (tensor.shape, tensor.sum()))
    assert all(map(torch.equal, ours, theirs))


@SLOW
def test_comfyui_gguf_encodes_what_we_encode(exact, write, make, city96):
    """BF16, since its text loader unpacks the others in float16."""
    path = make(write("whole clip_l", published.clip_l), T.BF16)
    clips = [loading.load_text_encoders([str(path)], "stable_diffusion")]
    loader = city96("nodes").CLIPLoaderGGUF()
    data = loader.load_data([str(path)])
    clips.append(loader.load_patcher([str(path)], comfy.sd.CLIPType.STABLE_DIFFUSION, data))
    with torch.inference_mode():
        ours, theirs = (clip.encode_from_tokens(clip.tokenize("a (red:1.2) fox")) for clip in clips)
    assert torch.equal(ours, theirs)


@pytest.fixture
def load(write, make, cpp):
    """load(qtype, option=(name, shapes), …, draw=…) -> the tensors that its log complains of."""

    def run(draw=False, **files):
        paths = {}
        for option, (name, shapes, qtype, *plan) in files.items():
            source = write(f"{name} in full", shapes, zeros=True)
            paths[option] = make(source, qtype, *plan[:1], **dict(plan[1:]))
        code, log = cpp("load", {option: str(path) for option, path in paths.items()}, draw)
        for path in paths.values():
            path.unlink()
        assert "Version:" in log and not (draw and code), log[-2000:]
        return {found[1] or found[3] for found in map(BAD.search, log.splitlines()) if found}

    return run


ENCODERS = {
    "clip_l_path": ("clip_l", published.clip_l, T.Q8_0),
    "clip_g_path": ("clip_g", published.clip_g, T.Q8_0),
}
UNUSED = {"text_encoders.clip_l.transformer.text_model.text_projection"}  # by SD3 and FLUX
T5 = {"t5xxl_path": ("t5xxl", published.t5xxl, T.Q4_0)}
VAE = {"vae_path": ("vae", published.vae, T.F16)}


def test_stable_diffusion_cpp_takes_flux_and_taef1(load):
    """A narrow FLUX, since it goes by the file; not a tensor of either is odd."""
    model = {"diffusion_model_path": ("narrow flux", published.flux, T.Q8_0)}
    assert not load(**model, taesd_path=("tae", published.tae, T.F16))


@SLOW
def test_stable_diffusion_cpp_draws_with_sd3(load):
    model = {"diffusion_model_path": ("sd3", published.sd3_medium, T.Q4_0)}
    assert load(True, **model, **ENCODERS, **VAE) <= UNUSED


@SLOW
def test_stable_diffusion_cpp_draws_with_flux(load):
    model = {"diffusion_model_path": ("flux", lambda: published.flux(3072), T.Q4_K)}
    clip = {"clip_l_path": ENCODERS["clip_l_path"]}
    assert load(True, **model, **clip, **T5, **VAE) <= UNUSED


@SLOW
def test_stable_diffusion_cpp_draws_with_sdxl_in_one_file(load):
    """It takes a UNet only together with its text encoders."""
    checkpoint = ("sdxl", published.sdxl_checkpoint, T.Q4_0, None, ("prefix", ""))
    assert not {name for name in load(True, model_path=checkpoint) if "logit_scale" not in name}


@SLOW
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("wan", lambda: published.wan(1536, 30)),
        ("qwen_image", published.qwen_image),
        ("z_image", lambda: published.z_image(30)),
    ],
)
def test_stable_diffusion_cpp_takes_every_tensor(load, name, shapes):
    """It goes on to their text encoders and VAEs, which are not there."""
    fields = {"fewstep.sigmas.2": [1.0, 0.5, 0.0]}
    bad = load(diffusion_model_path=(name, shapes, T.Q4_0, fields))
    assert not {tensor for tensor in bad if tensor.startswith("model.diffusion_model.")}
