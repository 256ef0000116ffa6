"""The nodes as a person meets them: over HTTP, with messages on the node, and help in the page."""

import pytest
from fewstep.nodes import quantizing, sampling, text

AUTO = "auto (from the checkpoint)"


def graph(**inputs):
    """A schedule, shown as text."""
    schedule = {"preset": "flux.1-schnell", "steps": 0, "denoise": 1.0, "shift": 0.0, "sigmas": ""}
    return {
        "1": {"class_type": "FewStepSchedule", "inputs": schedule | inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


def test_nodes_and_their_help_are_served(server):
    for node in [*sampling.NODES, *text.NODES, *quantizing.NODES]:
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
