"""MODEL and LATENT in, LATENT out: our schedules and rules, run by ComfyUI's own sampling.

Guiders, masks, previews, progress and the interrupt are the host's; ours are the sigmas and the
loop over them.
"""

import logging
from pathlib import Path

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview

from ..flow import PRESETS, RULES, Preset, find_preset, load_user_presets
from .loading import PRESET

log = logging.getLogger(__name__)

AUTO = "auto (from the checkpoint)"
AUTO_RULE = "auto"
PRESETS_FILE = "fewstep/presets.json"  # in ComfyUI's user folder


def user_presets() -> tuple[Preset, ...]:
    """Presets of the user's own file. Raises: ValueError naming the file and the remedy."""
    path = Path(folder_paths.get_user_directory()) / PRESETS_FILE
    return load_user_presets(path, taken=[AUTO, *(preset.name for preset in PRESETS)])


def preset_names() -> list[str]:
    """What a preset input offers. A faulty user's file is logged, and named when it is chosen."""
    try:
        own = user_presets()
    except ValueError as error:
        log.warning("%s", error)
        own = ()
    return [AUTO, *(preset.name for preset in (*PRESETS, *own))]


def named_preset(name: str) -> Preset:
    """A built-in or user's preset by name. Raises: ValueError."""
    known = {preset.name for preset in PRESETS}
    return find_preset(name, PRESETS if name in known else (*PRESETS, *user_presets()))


def checkpoint_preset(model) -> Preset | None:
    """The Preset that the MODEL's checkpoint carries; clones and LoRA nodes keep it."""
    return None if model is None else model.get_attachment(PRESET)


def choose_preset(name: str, model=None) -> Preset:
    """The preset called `name`; for `AUTO` the one of the MODEL's checkpoint.

    Raises: ValueError that names the remedy, also where a checkpoint has none.
    """
    if name != AUTO:
        return named_preset(name)
    if model is None:
        raise ValueError(f"'{AUTO}' needs the model: connect it, or choose a preset by name.")
    preset = checkpoint_preset(model)
    if preset is None:
        raise ValueError(
            "This model's file says nothing about its few-step schedule (it has no fewstep.* "
            "metadata). Choose the preset of your checkpoint by name, or type its sigmas."
        )
    return preset


def require_flow(model) -> None:
    """Raises: ValueError if the MODEL does not move on straight lines from noise to picture."""
    if model is None:
        return
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"This model ({type(model.model).__name__}) is not a flow model, so sigmas from 1 to "
            f"0 do not fit it. Sample it with ComfyUI's own nodes and schedulers."
        )


def latent_tokens(latent: dict) -> int:
    """Size of the LATENT's picture in tokens of 16² pixels, as FLUX.2 counts them."""
    samples = latent["samples"]
    ratio = latent.get("downscale_ratio_spacial") or (16 if samples.shape[1] == 128 else 8)
    return round(samples.shape[-1] * samples.shape[-2] * (ratio / 16) ** 2)


def schedule(preset: Preset, latent: dict | None, steps=0, shift=0.0, denoise=1.0):
    """SIGMAS of a preset, float32 (steps+1,); `steps` and `shift` 0: the preset's own.

    Raises: ValueError.
    """
    tokens = None if latent is None else latent_tokens(latent)
    return preset.sigmas(steps or None, tokens, shift or None, denoise)


def make_sampler(rule: str, preset: Preset | None) -> comfy.samplers.KSAMPLER:
    """SAMPLER of a step rule; "auto" is the preset's. Only re-noise can enlarge the latent."""
    rule = preset.rule if rule == AUTO_RULE else rule
    sides = preset.latent_sides if preset is not None and rule == "renoise" else ()
    return comfy.samplers.KSAMPLER(RULES[rule], {"sides": sides} if sides else {})


def sample(model, positive, negative, latent: dict, seed: int, cfg: float, sampler, sigmas) -> dict:
    """Draw as the stock SamplerCustom does -> LATENT. `negative` None: allowed at `cfg` 1 only.

    At `cfg` 1 the host runs the model once a step, on `positive` alone. Raises: ValueError.
    """
    if negative is None and cfg != 1:
        raise ValueError(f"cfg {cfg:g} needs a negative prompt: connect one, or set cfg to 1.")
    ratios = (latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios)
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    out["samples"] = comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(start, seed, latent.get("batch_index")),
        cfg,
        sampler,
        sigmas,
        positive,
        negative or [],
        latent_image=start,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return out
