"""What a user reads on a node: tooltips, units and help pages are there and name what exists."""

from pathlib import Path

import pytest
from fewstep.flow import PRESETS, T5_MODES
from fewstep.nodes import distilling, quantizing, sampling, text

NODES = [*sampling.NODES, *text.NODES, *quantizing.NODES, *distilling.NODES]
DOCS = Path(__file__).parents[2] / "web" / "docs"


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_schema_is_complete(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__
    assert schema.description and schema.search_aliases
    assert schema.category.startswith("model/")
    for item in [*schema.inputs, *schema.outputs]:
        assert item.tooltip, item.id


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_help_page_explains_every_input(node):
    page = (DOCS / f"{node.__name__}.md").read_text("utf-8")
    assert [item.id for item in node.GET_SCHEMA().inputs if f"| {item.id} |" not in page] == []


def test_help_lists_every_preset_and_mode():
    page = (DOCS / "FewStepSchedule.md").read_text("utf-8")
    assert [preset.name for preset in PRESETS if preset.name not in page] == []
    page = (DOCS / "FewStepTextEncode.md").read_text("utf-8")
    assert [mode for mode in T5_MODES if f"| {mode} |" not in page] == []
