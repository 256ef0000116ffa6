// Runs in ComfyUI's page: columns of node descriptions -> [saved workflow, API workflow].
// Give it a fresh page: after graph.clear() new nodes find the widget values of the old ones.
// A column is a list of groups {title, nodes}, from the top down; without a title no frame is drawn.
// A node is {name, type, title, size, widgets, inputs: {input: "node.OUTPUT"}}.
async (columns) => {
  const BETWEEN = { columns: 50, groups: 40, nodes: 30 };
  const TITLE = 30; // LiteGraph draws a node's title above its position
  const FRAME = 15; // from a group's frame to its nodes
  const graph = window.app.graph;
  graph.clear();

  const nodes = {};
  const described = columns.flat().flatMap((group) => group.nodes);
  for (const { name, type, title, widgets } of described) {
    const node = LiteGraph.createNode(type);
    if (!node) throw new Error(`ComfyUI has no node ${type}`);
    graph.add(node);
    if (title) node.title = title;
    for (const [key, value] of Object.entries(widgets)) {
      const widget = node.widgets.find((widget) => widget.name === key);
      if (!widget) throw new Error(`${type} has no widget ${key}`);
      widget.value = value;
    }
    nodes[name] = node;
  }

  for (const { name, inputs } of described) {
    for (const [input, source] of Object.entries(inputs)) {
      const [from, output] = source.split(".");
      const link = nodes[from].connect(nodes[from].findOutputSlot(output), nodes[name], input);
      if (!link) throw new Error(`cannot link ${source} to ${name}.${input}`);
    }
  }

  const needed = ({ name, size }) =>
    nodes[name].computeSize().map((least, axis) => Math.max(least, size[axis]));
  let x = 0;
  for (const column of columns) {
    const width = Math.max(...column.flatMap((group) => group.nodes).map((node) => needed(node)[0]));
    let y = 0;
    for (const { title, nodes: members } of column) {
      const top = y;
      if (title) y += TITLE + FRAME;
      for (const member of members) {
        const height = needed(member)[1];
        nodes[member.name].pos = [x, y + TITLE];
        nodes[member.name].setSize([width, height]);
        y += TITLE + height + BETWEEN.nodes;
      }
      y -= BETWEEN.nodes;
      if (title) {
        y += FRAME;
        const group = new LiteGraph.LGraphGroup(title);
        group.pos = [x - FRAME, top];
        group.size = [width + 2 * FRAME, y - top];
        graph.add(group);
      }
      y += BETWEEN.groups;
    }
    x += width + BETWEEN.columns;
  }

  const { workflow, output } = await window.app.graphToPrompt();
  delete workflow.extra?.ds; // where this page happened to look
  return [workflow, output];
};
