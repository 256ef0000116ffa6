"""The nodes as a person meets them: over HTTP, with messages on the node, and help in the page."""

import copy
import json

import pytest
from fewstep import run
from fewstep.nodes import distilling, quantizing, sampling, text

AUTO = "auto (from the checkpoint)"


def graph(**inputs):
    """A schedule, shown as text."""
    schedule = {"preset": "flux.1-schnell", "steps": 0, "denoise": 1.0, "shift": 0.0, "sigmas": ""}
    return {
        "1": {"class_type": "FewStepSchedule", "inputs": schedule | inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


def test_nodes_and_their_help_are_served(server):
    for node in [*sampling.NODES, *text.NODES, *quantizing.NODES, *distilling.NODES]:
        info = server.get(f"/object_info/{node.__name__}")[node.__name__]
        assert info["name"] == node.__name__ and info["description"]
        page = server.get(f"/extensions/fewstep/docs/{node.__name__}.md")
        assert page.startswith(b"# FewStep ")


@pytest.mark.parametrize(
    "inputs, said",
    [
        ({"preset": "gone"}, r"Unknown preset 'gone'. Known: sd3.5-flash-experimental, "),
        ({"preset": AUTO}, r"needs the model: connect it, or choose a preset by name"),
        ({"preset": "flux.2-klein-4b"}, r"depends on the picture's size: connect the latent"),
        ({"sigmas": "1, .5, .7, 0"}, r"Sigma 0.7 at place 2 of \[1, 0.5, 0.7, 0\] does not fall"),
        ({"sigmas": "1, .5"}, r"end in 0.5. Add a 0"),
        ({"sigmas": "1, nan, 0"}, r"Sigma nan at place 1"),
        ({"sigmas": "one, 0"}, r"'one' in the sigmas is not a number"),
    ],
)
def test_bad_input_is_answered_on_the_node_and_the_host_goes_on(server, inputs, said):
    with pytest.raises(Exception, match=rf"FewStepSchedule.*{said}"):  # run.Failure, of conftest
        server.run(graph(**inputs))
    assert "0.7500" in server.run(graph())["2"]["text"][0]


def test_an_edited_preset_is_read_again_without_a_restart(server):
    path = server.base / "user" / "fewstep" / "presets.json"
    path.parent.mkdir(parents=True)
    for level in (0.625, 0.375):
        path.write_text(f'{{"mine": {{"sigmas": [[1, {level}, 0]]}}}}', "utf-8")
        assert f"{level:.4f}" in server.run(graph(preset="mine"))["2"]["text"][0]
    path.unlink()


def test_a_model_is_watched_quantised_inspected_and_drawn(server):
    """What a person does with the quantising nodes, one after another."""
    demo = json.loads((run.ROOT / "workflows" / "api" / "demo.json").read_text("utf-8"))
    draws = next(node for node in demo.values() if node["class_type"] == "FewStepSample")
    loader = draws["inputs"]["model"][0]
    demo["w"] = {"class_type": "FewStepImportance", "inputs": {"model": [loader, 0]}}
    demo["w"]["inputs"]["filename_prefix"] = "importance/demo"
    draws["inputs"]["model"] = ["w", 0]
    for seed in (1, 2):  # the second run adds to the first one's file
        draws["inputs"]["seed"] = seed
        server.run(demo)
    inputs = server.get("/object_info/FewStepQuantize")["FewStepQuantize"]["input"]
    assert "demo_00001_.gguf" in inputs["optional"]["importance"][1]["options"]
    assert "demo_00002_.gguf" not in inputs["optional"]["importance"][1]["options"]
    quantise = {"model": [loader, 0], "recipe": "flash-4", "importance": "demo_00001_.gguf"}
    quantise["filename_prefix"] = "diffusion_models/demo"
    made = server.run(
        {loader: demo[loader], "q": {"class_type": "FewStepQuantize", "inputs": quantise}}
    )["q"]
    assert "Q4_K" in made["text"][0] and made["images"][0]["filename"].endswith(".png")
    name = "demo-flash-4_00001_.gguf"
    file = {"file": f"diffusion_models/{name}", "width": 128, "height": 128}
    told = server.run({"i": {"class_type": "FewStepInspect", "inputs": file}})["i"]["text"][0]
    assert name in told and "FewStep demo, 4 steps" in told and "fits" in told
    again = copy.deepcopy(demo)
    again[loader]["inputs"]["model_name"] = name
    assert server.run(again)


def test_a_lora_is_distilled_saved_and_drawn_with(server):
    """The demo model, made to draw in two steps; stock nodes take the LoRA."""
    demo = json.loads((run.ROOT / "workflows" / "api" / "demo.json").read_text("utf-8"))
    draws = next(node for node in demo.values() if node["class_type"] == "FewStepSample")
    inputs = draws["inputs"]
    schedule = {"preset": AUTO, "steps": 2, "denoise": 1.0, "shift": 0.0, "model": inputs["model"]}
    demo["s"] = {"class_type": "FewStepSchedule", "inputs": schedule}
    told = {"positive": inputs["positive"], "latents": inputs["latent"], "sigmas": ["s", 0]}
    told |= {"method": "trajectory", "steps": 3, "guidance": 1.0, "rank": 4, "seed": 0}
    told |= {"learning_rate": 1e-3, "teacher_steps": 4, "trajectories": 1}
    told["model"] = inputs["model"]
    demo["d"] = {"class_type": "FewStepDistill", "inputs": told}
    saved = {"lora": ["d", 0], "prefix": "loras/two", "steps": ["d", 2]}
    demo["f"] = {"class_type": "SaveLoRA", "inputs": saved}
    plotted = {"loss": ["d", 1], "filename_prefix": "loss"}
    demo["p"] = {"class_type": "LossGraphNode", "inputs": plotted}
    loaded = {"model": inputs["model"], "lora": ["d", 0], "strength_model": 1.0, "bypass": False}
    demo["l"] = {"class_type": "LoraModelLoader", "inputs": loaded}
    inputs["model"] = ["l", 0]
    made = server.run(demo)
    assert made["p"]["images"] and list(server.output.glob("loras/two_3_steps_*"))
