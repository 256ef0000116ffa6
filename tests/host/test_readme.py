"""What the papers say is what the code does: tables, paths, help pages."""

import re

from fewstep.nodes import NODES
from fewstep.tests import readme


def test_readmes_tables_are_made_from_the_code():
    written = readme.README.read_text(encoding="utf-8")
    assert written == readme.filled(written), "run `python tests/readme.py`"


def test_every_node_has_a_help_page_that_names_its_inputs():
    for node in NODES:
        schema = node.define_schema()
        page = (readme.ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n")
        for item in schema.inputs:
            name = re.sub(r"encoder_[23]", "encoder_1", item.id)  # the page says encoder_1 … 4
            assert re.search(rf"^\| .*\b{name}\b.* \|", page, re.M), f"{schema.node_id}: {item.id}"


def test_every_input_has_a_tooltip():
    for node in NODES:
        for item in node.define_schema().inputs:
            assert item.tooltip, f"{node.__name__}: {item.id}"


def test_paths_in_the_papers_exist():
    for paper in ("README.md", "CONTRIBUTING.md"):
        content = (readme.ROOT / paper).read_text(encoding="utf-8")
        rooms = "quant|flow|host|nodes|web|tests|demo|distill|workflows"
        named = re.findall(rf"`((?:{rooms})/[\w./]*)`", content)
        named += re.findall(r"\]\((?!http)([^)#]+)\)", content)
        assert named, paper
        for path in named:
            assert (readme.ROOT / path).exists(), f"{paper} names {path}"
