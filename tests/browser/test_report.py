"""The report of a node is read on the node, and goes neither into the prompt nor into the file."""

NODE = """() => {
  const node = LiteGraph.createNode("FewStepInspect");
  node.widgets.find((widget) => widget.name === "file").value =
    "diffusion_models/fewstep-demo.gguf";
  window.app.graph.clear();
  window.app.graph.add(node);
  window.app.queuePrompt(0);
}"""
REPORT = """() => window.app.graph.nodes[0].widgets
  .find((widget) => widget.name === "report")?.value"""


def test_report_is_shown_on_the_node(page):
    page.evaluate(NODE)
    page.wait_for_function(f"({REPORT})()?.includes('fits')")
    text = page.evaluate(REPORT)
    assert text.startswith("fewstep-demo.gguf: diffusion model, sd3") and "Q8_0" in text
    (exported,) = page.evaluate(
        "async () => Object.values((await window.app.graphToPrompt()).output)"
    )
    assert "report" not in exported["inputs"]
    saved = page.evaluate("() => window.app.graph.serialize().nodes[0].widgets_values")
    assert text not in saved
    page.evaluate("window.app.queuePrompt(0)")  # and one widget is enough
    count = "window.app.graph.nodes[0].widgets.filter((w) => w.name === 'report').length"
    assert page.evaluate(count) == 1
