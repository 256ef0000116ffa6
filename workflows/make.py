"""Make the workflows of this folder in the real frontend: `.venv/bin/python workflows/make.py`.

A workflow is described here by its columns of nodes. The page itself (build.js) creates, connects
and measures the nodes and lays the columns out side by side. Each gives three files: NAME.json as
the page saves it, api/NAME.json as it exports it for the API, and the thumbnail NAME.jpg. The
README's pictures are drawn along with them.
"""

import json
import sys
import tempfile
import uuid
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import run  # noqa: E402

run.load_pack()
from fewstep.tests import chromium  # noqa: E402
from fewstep.workflows import thumbnails  # noqa: E402

BUILD = (FOLDER / "build.js").read_text(encoding="utf-8")

DEMO = ("fewstep-demo.gguf", ["fewstep-demo-clip-l.gguf"], "fewstep-demo-vae.gguf")
DEMO_PROMPT = "a red circle on a blue background"
TYPED_SIGMAS = "1, 0.95, 0.9, 0.83, 0.75, 0.64, 0.5, 0.3, 0"
SD35_ENCODERS = ["clip_l.safetensors", "clip_g.safetensors", "t5-v1_1-xxl-encoder-Q5_K_M.gguf"]
SD35_VAE = "sd3.5_vae.safetensors"
SD35_PROMPT = (
    "A lighthouse on a basalt cliff at dusk, warm light in its windows, a rough sea below, thin "
    "clouds. Photograph."
)
SD35_FILES = """\
**models/text_encoders**
- `clip_l.safetensors`, `clip_g.safetensors` from Comfy-Org/stable-diffusion-3.5-fp8
- `t5-v1_1-xxl-encoder-Q5_K_M.gguf` from city96/t5-v1_1-xxl-encoder-gguf

**models/vae**
- `sd3.5_vae.safetensors`: the file in `vae/` of stabilityai/stable-diffusion-3.5-medium, renamed
"""

DEMO_NOTE = """\
## Nothing to download
The three files come with FewStep. Press **Run**.

The model draws `a {colour} {shape} on a {colour} background`, two shapes `left of`, `right of`, \
`above` or `below` each other, and `two` or `three` `{colour} {shape}s`.

**Colours** red, green, blue, yellow, orange, purple, cyan, white, black, gray

**Shapes** circle, square, triangle, star, ring, cross

Steps 0 and CFG 0 mean: as the model's file says.
"""

SD35_NOTE = f"""\
## SD3.5 Large Turbo in 4 steps
**models/diffusion_models**
- `sd3.5_large_turbo-Q4_0.gguf` from city96/stable-diffusion-3.5-large-turbo-gguf

{SD35_FILES}
Any other quantisation of these files will do.

**T5 is optional.** Short of memory or time? Set `encoder_3` to *none*: most short prompts come \
out as well. Lettering and long descriptions want T5.
"""

LORA_NOTE = f"""\
## A LoRA on a GGUF model
The stock LoRA loader works on a quantised model. This LoRA makes SD3.5 Medium draw in 8 steps. \
The schedule is the LoRA's, not the model's, so `preset` names it.

**models/diffusion_models**
- `sd3.5_medium-Q6_K.gguf` from city96/stable-diffusion-3.5-medium-gguf

**models/loras**
- `lora_sd3.5m_turbo_8steps.safetensors` from tensorart/stable-diffusion-3.5-medium-turbo

{SD35_FILES}"""

SCHEDULE_NOTE = """\
## A schedule by hand
**FewStep Schedule** and **FewStep Sampler** give stock SIGMAS and SAMPLER for \
SamplerCustomAdvanced and every node around it.

Type the noise levels into `sigmas`, from 1 (pure noise) down to 0 (the picture). Small steps near \
1 settle the layout, small steps near 0 the detail. Leave it empty and the preset counts.

The files come with FewStep. Press **Run**.
"""

QUANTIZE_NOTE = """\
## Make a model smaller
Press **Run**: the files come with FewStep. For your own model load its 16-bit file.

**FewStep Quantize** writes the MODEL with its LoRAs as a GGUF file into \
`output/diffusion_models` and shows what that cost. Press **R**, and the loader offers it.

**FewStep Importance** is optional: each picture drawn adds to its file. Draw a dozen, press \
**R**, choose the file as `importance` and press **Run** again.

To see what it cost in pictures, draw with both files from the same seed, and connect both latents \
to **FewStep Compare**.
"""

TEACHER_NOTE = """\
## Four steps beside fifty
Press **Run**: both models come with FewStep. The left picture is the teacher's: 50 steps, each \
run twice for its guidance. The right one is its student's: 4 steps, run once each.

Both start from the same noise, and the next run from other noise. The student was taught to end \
where its teacher does, or at the nearest picture that is right; the report says how close it comes.

How it learned, and how well: `docs/distilled.md`.
"""


STYLES_NOTE = """\
## Two looks
Press **Run**: model and LoRAs come with FewStep. `fewstep-outline` draws lines instead of filled \
shapes, `fewstep-ink` in black on white. They fit this small model only.

The stock LoRA loader works on a quantised model: the weights stay in 6 bits, the LoRAs are \
computed beside them. A new strength counts from the next picture on. The ink waits at 0: try 1 \
for it and 0 for the outline, or some of both.

They were trained on what the model draws, by `python -m distill style`.
"""


def node(name, type, inputs=(), size=(270, 0), title=None, **widgets):
    """One node. `inputs`: {input: "node.OUTPUT"}; `size`: at least so many pixels."""
    return {
        "name": name,
        "type": type,
        "inputs": dict(inputs),
        "widgets": widgets,
        "title": title,
        "size": size,
    }


def group(title, *nodes):
    return {"title": title, "nodes": nodes}


def note(text, height):
    return group(None, node("note", "MarkdownNote", size=(330, height), title="Read me", text=text))


def load(model, encoders, vae):
    encoders = {f"encoder_{i}": file for i, file in enumerate(encoders, 1)}
    return group(
        "1. Load",
        node("model", "FewStepLoadDiffusionModel", model_name=model),
        node("clip", "FewStepLoadTextEncoders", **encoders),
        node("vae", "FewStepLoadVAE", vae_name=vae),
    )


def describe(prompt, side):
    encode = {"clip": "clip.CLIP", "model": "model.MODEL"}
    return group(
        "2. Say what to draw",
        node("text", "FewStepTextEncode", encode, (300, 240), text=prompt),
        node("size", "EmptySD3LatentImage", title="Size", **{"width": side, "height": side}),
    )


def draw(model="model.MODEL", **widgets):
    return group("3. Draw", sample("draw", model, seed=1, **widgets))


def sample(name, model, more=(), **widgets):
    inputs = {"model": model, "positive": "text.CONDITIONING", "latent": "size.LATENT"}
    return node(name, "FewStepSample", inputs | dict(more), **widgets)


def decode(latent):
    return node("decode", "VAEDecode", {"samples": latent, "vae": "vae.VAE"}, (140, 0))


def save(prefix):
    return group(
        "The picture",
        node("save", "SaveImage", {"images": "decode.IMAGE"}, (260, 300), filename_prefix=prefix),
    )


def lora(name, model, file, strength=1.0):
    widgets = {"lora_name": file, "strength_model": strength}
    return node(name, "LoraLoaderModelOnly", {"model": model}, **widgets)


LORA = lora("lora", "model.MODEL", "lora_sd3.5m_turbo_8steps.safetensors")
OUTLINE = lora("outline", "model.MODEL", "fewstep-outline.safetensors")
INK = lora("ink", "outline.MODEL", "fewstep-ink.safetensors", 0.0)
PARTS = [
    node("noise", "RandomNoise", noise_seed=1),
    node("guider", "BasicGuider", {"model": "model.MODEL", "conditioning": "text.CONDITIONING"}),
    node("rule", "FewStepSampler", {"model": "model.MODEL"}, rule="euler"),
    node(
        "schedule",
        "FewStepSchedule",
        {"model": "model.MODEL"},
        sigmas=TYPED_SIGMAS,
    ),
]
SAMPLE = node(
    "draw",
    "SamplerCustomAdvanced",
    {
        "noise": "noise.NOISE",
        "guider": "guider.GUIDER",
        "sampler": "rule.SAMPLER",
        "sigmas": "schedule.SIGMAS",
        "latent_image": "size.LATENT",
    },
    (220, 0),
)
INSPECT = node(
    "inspect",
    "FewStepInspect",
    size=(500, 480),  # with room for the report
    file="diffusion_models/fewstep-demo.gguf",
    width=128,
    height=128,
)
QUANTIZE = node("write", "FewStepQuantize", {"model": "model.MODEL"}, (700, 940), recipe="flash-4")
WATCH = node("watch", "FewStepImportance", {"model": "model.MODEL"})

TEACHER = node("teacher", "FewStepLoadDiffusionModel", model_name="fewstep-teacher.gguf")
NOTHING = node("nothing", "FewStepTextEncode", {"clip": "clip.CLIP"}, (300, 180), text="")
LESSON = sample("lesson", "teacher.MODEL", {"negative": "nothing.CONDITIONING", "seed": "seed.INT"})
PUPIL = sample("draw", "model.MODEL", {"seed": "seed.INT"})
# "fixed" is the page's name for this one's control after generate
SEED = node("seed", "PrimitiveInt", title="Seed", value=1, fixed="increment")
COMPARE = node(
    "compare",
    "FewStepCompare",
    {"original": "lesson.LATENT", "other": "draw.LATENT", "vae": "vae.VAE"},
    (480, 420),
)

# name -> columns from left to right, each a list of groups from the top down
WORKFLOWS = {
    "demo": [
        [note(DEMO_NOTE, 320)],
        [load(*DEMO)],
        [describe(DEMO_PROMPT, 128)],
        [draw()],
        [group(None, decode("draw.LATENT"))],
        [save("FewStep")],
    ],
    "teacher_and_student": [
        [note(TEACHER_NOTE, 320)],
        [load(*DEMO), group("The teacher", TEACHER)],
        [describe(DEMO_PROMPT, 128), group("For its guidance", NOTHING)],
        [group("3. Draw", SEED), group("In 50 steps", LESSON), group("In 4 steps", PUPIL)],
        [group("Side by side", COMPARE)],
    ],
    "style_loras": [
        [note(STYLES_NOTE, 330)],
        [load(*DEMO)],
        [group("The stock LoRA loader, twice", OUTLINE, INK), describe(DEMO_PROMPT, 128)],
        [draw("ink.MODEL")],
        [group(None, decode("draw.LATENT"))],
        [save("FewStep-styles")],
    ],
    "sd35_few_step": [
        [note(SD35_NOTE, 480)],
        [load("sd3.5_large_turbo-Q4_0.gguf", SD35_ENCODERS, SD35_VAE)],
        [describe(SD35_PROMPT, 1024)],
        [draw(preset="sd3.5-large-turbo")],
        [group(None, decode("draw.LATENT"))],
        [save("FewStep-SD3.5")],
    ],
    "lora_on_gguf": [
        [note(LORA_NOTE, 520)],
        [load("sd3.5_medium-Q6_K.gguf", SD35_ENCODERS, SD35_VAE)],
        [group("The stock LoRA loader", LORA), describe(SD35_PROMPT, 1024)],
        [draw("lora.MODEL", preset="sd3.5-medium-turbo")],
        [group(None, decode("draw.LATENT"))],
        [save("FewStep-LoRA")],
    ],
    "schedule_by_hand": [
        [note(SCHEDULE_NOTE, 330)],
        [load(*DEMO)],
        [describe(DEMO_PROMPT, 128)],
        [group("3. Choose the steps", *PARTS)],
        [group("4. Draw", SAMPLE, decode("draw.output"))],
        [save("FewStep-schedule")],
    ],
    "quantize": [
        [note(QUANTIZE_NOTE, 340), group("Will it fit?", INSPECT)],
        [load(*DEMO)],
        [group("2. Write it smaller", QUANTIZE)],
        [group("Optional: watch it draw", WATCH, *describe(DEMO_PROMPT, 128)["nodes"])],
        [
            group(
                "Draw",
                *draw("watch.MODEL")["nodes"],
                decode("draw.LATENT"),
                *save("FewStep-quantize")["nodes"],
            )
        ],
    ],
}


def main():
    with tempfile.TemporaryDirectory() as folder:
        host = run.Host(run.comfyui_folder(), Path(folder, "base"), sys.executable, ["--cpu"])
        with host:
            make_graphs(host, Path(folder, "profile"))
            make_thumbnails(host)


def make_graphs(host, profile):
    with chromium.window(host, profile) as window:
        for name, columns in WORKFLOWS.items():
            page = chromium.open_page(window, host)
            saved, exported = page.evaluate(BUILD, columns)
            page.close()
            saved["id"] = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.fewstep"))
            write(FOLDER / f"{name}.json", saved)
            write(FOLDER / "api" / f"{name}.json", exported)


def make_thumbnails(host):
    def drawn(name, prompts, **strengths):
        workflow = run.read_workflow(FOLDER / "api" / f"{name}.json")
        for node in workflow.values():
            for look, strength in strengths.items():
                if look in node["inputs"].get("lora_name", ""):
                    node["inputs"]["strength_model"] = strength
        filled = [run.fill_in(workflow, prompt) for prompt in prompts]
        return [host.draw(graph, on_step=run.print_step)[0] for graph in filled]

    looks = [{"outline": a, "ink": b} for a, b in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))]
    styled = [
        png
        for prompt in thumbnails.STYLED
        for look in looks
        for png in drawn("style_loras", [prompt], **look)
    ]

    pictures = {
        "demo": thumbnails.demo(drawn("demo", thumbnails.DEMO_PROMPTS)),
        "teacher_and_student": thumbnails.side_by_side(
            "50 steps, 4 steps",
            "a teacher, and the student that ships",
            drawn("teacher_and_student", thumbnails.DEMO_PROMPTS[2:]),
        ),
        "style_loras": thumbnails.card(
            "Style LoRAs",
            "plain, outline, ink: on a model in 6 bits",
            [np.asarray(picture) / 255 for picture in thumbnails.opened(styled)],
        ),
        "quantize": thumbnails.bits(
            "Quantize", "a MODEL and its LoRAs into a GGUF", thumbnails.DEMO_PROMPTS[2]
        ),
        **thumbnails.schedules(TYPED_SIGMAS),
    }
    for name, picture in pictures.items():
        picture.save(FOLDER / f"{name}.jpg", quality=88)
    readme = thumbnails.readme(drawn("demo", thumbnails.README_PROMPTS))
    readme.save(FOLDER.parent / "demo" / "pictures.png", optimize=True)


def write(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(FOLDER))


if __name__ == "__main__":
    main()
