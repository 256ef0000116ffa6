// Shows the report of a FewStep node on the node itself, below its inputs.
import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const ROOM = [480, 220]; // pixels: the node's width at least, and what the report gets
const NODES = ["FewStepQuantize", "FewStepInspect", "FewStepCompare"];

function reportWidget(node) {
  const known = node.widgets?.find((widget) => widget.name === "report");
  if (known) return known;
  const { widget } = ComfyWidgets.STRING(node, "report", ["STRING", { multiline: true }], app);
  widget.serialize = false; // neither into the saved workflow
  widget.options.serialize = false; // nor into the prompt
  widget.element.readOnly = true;
  widget.element.style.fontFamily = "monospace";
  widget.element.style.whiteSpace = "pre";
  const height = node.computeSize()[1] + ROOM[1];
  node.setSize([Math.max(node.size[0], ROOM[0]), Math.max(node.size[1], height)]);
  return widget;
}

app.registerExtension({
  name: "FewStep.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) reportWidget(this).value = output.text.join("\n");
    };
  },
});
