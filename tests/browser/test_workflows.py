"""Each workflow in the real page: whole, tidy, the same as its API twin; and the demo is drawn."""

import io
import json
import re
import time

import numpy as np
import pytest
from fewstep import run
from fewstep.demo.score import score
from fewstep.tests import chromium
from PIL import Image

FOLDER = run.ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
FOLDERS = {"model_name": "diffusion_models", "vae_name": "vae", "lora_name": "loras"} | {
    f"encoder_{n}": "text_encoders" for n in range(1, 5)
}

# What a person would see in red, in words: [] if nothing is.
FAULTS = """() => {
  const graph = window.app.graph;
  const faults = [];
  for (const node of graph.nodes) {
    if (!LiteGraph.registered_node_types[node.type]) faults.push(`no node ${node.type}`);
    if (node.has_errors) faults.push(`${node.type} is framed in red`);
    for (const widget of node.widgets ?? []) {
      const values = widget.type === "combo" ? widget.options.values : [widget.value];
      if (!values.includes(widget.value)) faults.push(`${widget.name} offers no ${widget.value}`);
    }
    for (const input of node.inputs ?? []) {
      if (input.link == null) continue;
      const link = graph.getLink(input.link);
      const output = link && graph.getNodeById(link.origin_id)?.outputs[link.origin_slot];
      if (!output || !LiteGraph.isValidConnection(output.type, input.type))
        faults.push(`red link into ${node.type}.${input.name}`);
    }
  }
  return faults;
}"""
OVERLAPS = """() => {
  const boxes = window.app.graph.nodes.map((node) => [node.id, ...node.boundingRect]);
  const meet = ([, x, y, w, h], [, X, Y, W, H]) => x < X + W && X < x + w && y < Y + H && Y < y + h;
  const pairs = boxes.flatMap((a, i) => boxes.slice(i + 1).map((b) => [a, b]));
  return pairs.filter(([a, b]) => meet(a, b)).map(([a, b]) => [a[0], b[0]]);
}"""


def twin(name):
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def downloads(server):
    """Empty files where a workflow's files would lie once downloaded; the demo's files ship."""
    for name in NAMES:
        for node in twin(name).values():
            for key, folder in FOLDERS.items():
                file = node["inputs"].get(key, "none")
                if file != "none" and not file.startswith("fewstep-"):
                    path = server.base / "models" / folder / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()


@pytest.fixture(scope="module", params=NAMES)
def opened(request, window, server, downloads):
    """A workflow's name, and the page that has opened it as a click under Templates does."""
    name = request.param
    page = chromium.open_page(window, server, f"/?template={name}&source=fewstep")
    nodes = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
    page.wait_for_function(
        "types => window.app.graph.nodes.map((node) => node.type).sort().join() === types",
        arg=",".join(sorted(node["type"] for node in nodes)),
    )
    yield name, page
    page.close()


def errors_shown(page):
    return page.get_by_text(re.compile(r"\d+ errors? found")).count()


def test_nothing_is_missing_or_red(opened):
    _, page = opened
    assert page.evaluate(FAULTS) == []
    page.wait_for_timeout(1000)  # the page looks for missing files by itself
    assert errors_shown(page) == 0


def test_no_node_covers_another(opened):
    _, page = opened
    assert page.evaluate(OVERLAPS) == []


def test_export_is_the_api_twin(opened):
    name, page = opened
    exported = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    assert exported == twin(name), "run workflows/make.py"


def test_faults_would_be_seen(window, server, downloads):
    """The checks above can fail: the same on a workflow with three faults."""
    graph = json.loads((FOLDER / "demo.json").read_text(encoding="utf-8"))
    by_type = {node["type"]: node for node in graph["nodes"]}
    by_type["SaveImage"]["type"] = "SaveImageNobodyHas"
    by_type["FewStepLoadVAE"]["widgets_values"] = ["lost.gguf"]
    decode = next(i for i in by_type["VAEDecode"]["inputs"] if i["name"] == "vae")
    next(link for link in graph["links"] if link[0] == decode["link"])[2] = 7  # no such output
    page = chromium.open_page(window, server)
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    faults = page.evaluate(FAULTS)
    page.get_by_text(re.compile(r"\d+ errors? found")).wait_for()
    page.close()
    assert "no node SaveImageNobodyHas" in faults
    assert "vae_name offers no lost.gguf" in faults
    assert "red link into VAEDecode.vae" in faults


def test_the_demo_is_drawn_by_the_page(window, server):
    page = chromium.open_page(window, server, "/?template=demo&source=fewstep")
    page.wait_for_function("window.app.graph.findNodesByType('FewStepSample').length === 1")
    before = set(server.get("/history"))
    page.evaluate("window.app.queuePrompt(0)")
    page.wait_for_function("Object.values(window.app.nodeOutputs).some((output) => output.images)")
    page.close()
    deadline = time.monotonic() + 60
    while not (new := set(server.get("/history")) - before):
        assert time.monotonic() < deadline
    (entry,) = (server.get("/history")[prompt] for prompt in new)
    (image,) = (i for output in entry["outputs"].values() for i in output["images"])
    picture = np.asarray(Image.open(io.BytesIO(server.get("/view", **image))).convert("RGB"))
    prompt = run.prompt_of(twin("demo"))
    assert score(picture, prompt).right, f"this is no {prompt}"
