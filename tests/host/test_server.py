"""The real ComfyUI over HTTP, as run.py starts it, draws every workflow that ships."""

import io

import numpy as np
import pytest
import torch
from fewstep import run
from fewstep.demo.score import score
from fewstep.quant import GGUFFile
from PIL import Image
from safetensors.torch import save_file

WORKFLOWS = run.ROOT / "workflows" / "api"
MODEL = run.ROOT / "demo" / "models" / "diffusion_models" / "fewstep-demo.gguf"
STEPS = {
    "demo": None,
    "sd35_few_step": 4,
    "lora_on_gguf": 8,
    "schedule_by_hand": 8,
    "style_loras": 4,
}
WRITES = ("quantize",)  # they draw too, but report more than a sampler's steps
COMPARES = "teacher_and_student"  # draws twice
KNOWN = {*STEPS, *WRITES, COMPARES}
SMALL = {  # what stands in for the files of SD3.5, so that its workflows run here
    "model_name": "fewstep-demo.gguf",
    "encoder_1": "fewstep-demo-clip-l.gguf",
    "encoder_2": "none",
    "encoder_3": "none",
    "vae_name": "fewstep-demo-vae.gguf",
    "width": 128,
    "height": 128,
}


def small(name):
    """A workflow's API twin; those of SD3.5 with the demo's files and size."""
    graph = run.read_workflow(WORKFLOWS / f"{name}.json")
    for node in graph.values() if name in ("sd35_few_step", "lora_on_gguf") else ():
        known = {key: value for key, value in SMALL.items() if key in node["inputs"]}
        node["inputs"] |= known
    return graph


def drawn(server, graph):
    """Picture (128, 128, 3) and the (step, of how many) that were reported on the way."""
    steps = []
    (png,) = server.draw(graph, on_step=lambda value, total: steps.append((value, total)))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), steps


@pytest.fixture(scope="module")
def lora(server):
    """A random LoRA of rank 4 for the demo's model, under the name that the workflow asks for."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, info in GGUFFile(MODEL).tensors.items():
        if name.endswith("attn.qkv.weight"):
            rows, columns = info.shape
            key = "diffusion_model." + name.removeprefix("model.").removesuffix(".weight")
            up = torch.randn(rows, 4, generator=generator) * 0.1
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
    assert tensors
    (lora,) = (
        n["inputs"]["lora_name"]
        for n in small("lora_on_gguf").values()
        if "lora_name" in n["inputs"]
    )
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / lora)


@pytest.mark.parametrize("name", STEPS)
def test_every_workflow_draws_in_the_steps_it_promises(server, lora, name):
    graph = run.fill_in(small(name), seed=2026)  # none drawn before, which would come from a cache
    picture, steps = drawn(server, graph)
    assert picture.shape == (128, 128, 3)
    values, totals = zip(*steps, strict=True)
    assert list(values) == sorted(set(values))  # ComfyUI leaves some out when they come fast
    assert set(totals) == {values[-1]}
    assert STEPS[name] in (None, values[-1])


def test_every_workflow_is_known_here():
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == KNOWN


def test_teacher_and_student_draw_the_same_picture_in_50_and_in_4_steps(server):
    graph, prompt = small(COMPARES), "a green square on a white background"
    pictures, steps = drawn(server, run.fill_in(graph, prompt, seed=8))
    assert {total for _, total in steps} == {50, 4}
    teachers, students = np.split(pictures, 2, axis=1)
    assert score(teachers, prompt).right and score(students, prompt).right
    assert np.abs(teachers.astype(int) - students).mean() < 12  # out of 255


@pytest.mark.parametrize("name", WRITES)
def test_a_workflow_that_writes_also_reports_and_draws(server, name):
    outputs = server.run(run.read_workflow(WORKFLOWS / f"{name}.json")).values()
    assert sum("text" in output for output in outputs) == 2
    assert sum("images" in output for output in outputs) == 2
    assert list(server.output.rglob("*flash-4*.gguf"))
    assert list((server.output / "importance").iterdir())


def test_the_stock_lora_changes_the_picture(server, lora):
    graph = small("lora_on_gguf")
    with_lora, _ = drawn(server, graph)
    (loader,) = (node for node in graph.values() if "strength_model" in node["inputs"])
    loader["inputs"]["strength_model"] = 0.0
    without, _ = drawn(server, graph)
    assert np.abs(with_lora.astype(int) - without).mean() > 1


def test_shipped_loras_draw_lines_and_black_on_white(server):
    """Each alone, and one by half: told by how much is drawn on the background, and how gaudy."""
    graph = run.fill_in(small("style_loras"), "a red circle on a blue background", seed=4)
    covered, gaudy = {}, {}
    for strengths in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.0)):
        for look, strength in zip(("outline", "ink"), strengths, strict=True):
            (node,) = (n for n in graph.values() if look in n["inputs"].get("lora_name", ""))
            node["inputs"]["strength_model"] = strength
        picture = drawn(server, graph)[0] / 255
        ground = np.median(picture, (0, 1))
        covered[strengths] = (np.abs(picture - ground).max(2) > 0.5).mean()
        gaudy[strengths] = np.ptp(picture, 2).mean()
    assert 0.1 * covered[0.0, 0.0] < covered[1.0, 0.0] < 0.6 * covered[0.0, 0.0]
    assert 1.2 * covered[1.0, 0.0] < covered[0.5, 0.0] < 0.9 * covered[0.0, 0.0]
    assert gaudy[0.0, 1.0] < 0.1 < 0.5 < gaudy[0.0, 0.0] < gaudy[1.0, 0.0] + 0.2


@pytest.mark.parametrize(
    "prompt", ["a red circle on a blue background", "a yellow star on a black background"]
)
def test_the_demo_draws_what_the_prompt_says(server, prompt):
    workflow = run.read_workflow(WORKFLOWS / "demo.json")
    picture, _ = drawn(server, run.fill_in(workflow, prompt, seed=1))
    assert score(picture, prompt).right


def test_the_same_seed_gives_the_same_picture(server):
    """A new prompt in between makes ComfyUI compute anew instead of answering from its cache."""
    workflow = run.read_workflow(WORKFLOWS / "demo.json")
    prompts = ["a green ring on a white background", "a cyan cross on a gray background"]
    first, other, again = (
        drawn(server, run.fill_in(workflow, prompts[i], seed=3))[0] for i in (0, 1, 0)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_refused_workflow_names_the_node_and_the_reason(server):
    graph = run.read_workflow(WORKFLOWS / "demo.json")
    (loader,) = (node for node in graph.values() if "vae_name" in node["inputs"])
    loader["inputs"]["vae_name"] = "lost.gguf"
    with pytest.raises(run.Failure, match=r"FewStep Load VAE: Value not in list.*lost\.gguf"):
        server.run(graph)


def test_templates_and_their_pictures_are_served(server):
    names = server.get("/workflow_templates")["fewstep"]
    assert set(names) == KNOWN
    for name in names:
        picture = server.get(f"/api/workflow_templates/fewstep/{name}.jpg")
        assert Image.open(io.BytesIO(picture)).size == (512, 512)
