"""The loaders as a person meets them: lists with the shipped files, clear words on bad ones."""

import struct

import pytest
import torch
from fewstep.host import folders
from fewstep.tests.host import toys

INPUTS = {
    "FewStepLoadDiffusionModel": ("model_name", "diffusion_models", "MODEL"),
    "FewStepLoadTextEncoders": ("encoder_1", "text_encoders", "CLIP"),
    "FewStepLoadVAE": ("vae_name", "vae", "VAE"),
}
SHIPPED = {
    "FewStepLoadDiffusionModel": "fewstep-demo.gguf",
    "FewStepLoadTextEncoders": "fewstep-demo-clip-l.gguf",
    "FewStepLoadVAE": "fewstep-demo-vae.gguf",
}


def options(server, node):
    name = INPUTS[node][0]
    kind, details = server.get(f"/object_info/{node}")[node]["input"]["required"][name]
    return details["options"] if kind == "COMBO" else kind


def graph(node, file):
    """Load a file, and look at what came so that it runs."""
    inputs = {INPUTS[node][0]: file}
    if node == "FewStepLoadTextEncoders":
        inputs["type"] = "sd3"
    return {
        "1": {"class_type": node, "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


def put(server, node, name, content):
    folder = server.base / "models" / INPUTS[node][1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def refused(server, node, file, said):
    with pytest.raises(Exception, match=rf"{node}.*{said}"):  # run.Failure, of conftest
        server.run(graph(node, file))


@pytest.mark.parametrize("node", INPUTS)
def test_shipped_files_are_in_the_lists_and_load(server, node):
    assert SHIPPED[node] in options(server, node)
    assert server.run(graph(node, SHIPPED[node]))["2"]["text"]


def test_stock_loaders_lists_are_left_alone(server):
    listed = server.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]
    assert not any(name.endswith(".gguf") for name in listed["unet_name"][0])


def valid(tmp_path):
    toys.write(tmp_path / "v.gguf", "sd3", {"a.weight": torch.ones(32, 32)})
    return (tmp_path / "v.gguf").read_bytes()


@pytest.mark.parametrize("node", INPUTS)
def test_bad_files_are_named_with_a_remedy_and_the_host_goes_on(server, tmp_path, node):
    good = valid(tmp_path)
    bad = {
        "truncated.gguf": (good[:-100], r"truncated\.gguf.*download"),
        "empty.gguf": (b"", r"empty\.gguf"),
        "version.gguf": (good[:4] + struct.pack("<I", 99) + good[8:], r"version\.gguf.*version"),
        "zip.gguf": (b"PK\3\4" + bytes(64), r"zip\.gguf.*pickle"),
        "html.gguf": (b"<!DOCTYPE html><html>" + bytes(64), r"html\.gguf"),
    }
    for name, (content, _) in bad.items():
        put(server, node, name, content)
    assert set(bad) <= set(options(server, node))
    for name, (_, said) in bad.items():
        refused(server, node, name, said)
    assert server.run(graph(node, SHIPPED[node]))["2"]["text"]


def test_pickles_are_not_even_listed(server):
    for node in INPUTS:
        put(server, node, "pickle.ckpt", b"PK\3\4")
        assert "pickle.ckpt" not in options(server, node)


def test_all_slots_none_is_a_clear_error(server):
    refused(server, "FewStepLoadTextEncoders", "none", "choose at least one file")


def test_a_file_that_vanished_names_the_folders():
    with pytest.raises(FileNotFoundError, match=r"gone\.gguf is not there.*unet"):
        folders.model_path("diffusion_models", "gone.gguf")
