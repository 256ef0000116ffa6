"""The built-in presets. Sigmas are the truth; a formula stands where it gives them exactly.

Add a preset: one row here, its printed values in tests/flow/test_table.py, its source in the row.
SANA-Sprint is left out: it moves on a circle (TrigFlow, x = cos t·x0 + sin t·noise), which neither
rule covers.
"""

from dataclasses import replace

from .errors import one_of
from .presets import Preset

TURBO = Preset(
    name="sd3.5-large-turbo",
    label="SD3.5 Large Turbo",
    steps=4,
    formula="sgm_uniform",
    shift=3.0,
    sure="H",
    source="stabilityai/stable-diffusion-3.5-large-turbo, ComfyUI example workflow (sgm_uniform)",
)

MEDIUM_TURBO = Preset(
    name="sd3.5-medium-turbo",
    label="SD3.5 Medium Turbo (TensorArt)",
    steps=8,
    formula="uniform",
    shift=3.0,
    note="4 steps with TensorArt's LoRA. CFG 1 to 1.5.",
    sure="H",
    source="tensorart/stable-diffusion-3.5-medium-turbo, model card (shift 3)",
)

SENSEFLOW = Preset(
    name="senseflow-sd3.5",
    label="SenseFlow SD3.5",
    steps=4,
    formula="uniform",
    shift=3.0,
    rule="renoise",
    sure="M",
    source="SenseFlow, arXiv 2506.00523: both rules are published",
)

WAN21 = Preset(
    name="wan2.1-lightx2v",
    label="Wan2.1 LightX2V",
    steps=4,
    formula="uniform",
    shift=5.0,
    note="LightX2V's 4-step LoRA or checkpoint.",
    sure="H",
    source="lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill, model card (shift 5, CFG off)",
)

PRESETS = (
    Preset(
        name="sd3.5-flash-experimental",
        label="SD3.5-Flash style (experimental)",
        steps=4,
        rows=((1, 0.9, 0.75, 0.5, 0), (1, 0.75, 0)),
        shift=3.0,
        note="The paper publishes no sigmas: these are the teacher's shift, evenly spaced.",
        sure="G",
        source="arXiv 2509.21318: 4 and 2 steps at CFG 1, teacher's shift 3",
    ),
    TURBO,
    replace(
        TURBO,
        name="sd3.5-large-turbo-ref",
        label="SD3.5 Large Turbo, diffusers' schedule",
        formula="diffusers",
        note="The schedule of diffusers' default options; its last step does almost nothing.",
        source="stabilityai/stable-diffusion-3.5-large-turbo, diffusers example",
    ),
    MEDIUM_TURBO,
    Preset(
        name="swd-sd3.5",
        label="SwD SD3.5 (grows the latent)",
        steps=4,
        rows=(
            (1, 0.8959, 0.7371, 0.6022, 0),
            (1, 0.9454, 0.8959, 0.7904, 0.7371, 0.6022, 0),
        ),
        shift=3.0,
        rule="renoise",
        latent_sides=((64, 80, 96, 128), (32, 48, 64, 80, 96, 128)),
        note="SwD's LoRA. Give a latent of the final size; the steps before run smaller.",
        sure="H",
        source="yandex-research/swd, README, table of scales and sigmas",
    ),
    SENSEFLOW,
    replace(SENSEFLOW, name="senseflow-sd3.5-euler", label="SenseFlow SD3.5, euler", rule="euler"),
    Preset(
        name="flux.1-schnell",
        label="FLUX.1 schnell",
        steps=4,
        formula="uniform",
        shift=1.0,
        sure="H",
        source="black-forest-labs/flux, src/flux/sampling.py, get_schedule(shift=False)",
    ),
    Preset(
        name="flux.1-dev-8-step-lora",
        label="FLUX.1 dev with Turbo-Alpha or Hyper LoRA",
        steps=8,
        formula="uniform",
        shift=3.158192909689767,  # e^1.15: mu at 1024²
        note="LoRA strength 1.0 (Turbo-Alpha) or 0.125 (Hyper); guidance 3.5.",
        sure="M",
        source="alimama-creative/FLUX.1-Turbo-Alpha and ByteDance/Hyper-SD, model cards; mu 1.15",
    ),
    Preset(
        name="qwen-image-lightning",
        label="Qwen-Image-Lightning",
        steps=4,
        formula="uniform",
        shift=3.0,
        note="Lightning's 4-step or 8-step LoRA.",
        sure="H",
        source="ModelTC/Qwen-Image-Lightning, README (shift 3)",
    ),
    replace(
        MEDIUM_TURBO,
        name="z-image-turbo",
        label="Z-Image-Turbo",
        note="ComfyUI's template samples it with res_multistep instead of euler.",
        source="Tongyi-MAI/Z-Image, README; ComfyUI template (shift 3)",
    ),
    Preset(
        name="flux.2-klein-4b",
        label="FLUX.2 klein 4B, distilled",
        steps=4,
        formula="flux2",
        sure="H",
        source="black-forest-labs/flux2, src/flux2/sampling.py, get_schedule",
    ),
    WAN21,
    replace(
        WAN21,
        name="wan2.2-a14b-lightx2v",
        label="Wan2.2 A14B LightX2V",
        expert_boundary=0.875,
        note="Steps 0 and 1 by the high-noise model, 2 and 3 by the low-noise one: SplitSigmas 2.",
        source="lightx2v/Wan2.2-Lightning, README; Wan2.2 wan_t2v_A14B.py (boundary)",
    ),
)


def find_preset(name, presets=PRESETS):
    """The preset called `name`. Raises ValueError listing the names known."""
    by_name = {preset.name: preset for preset in presets}
    return by_name[one_of(name, by_name, "preset")]
