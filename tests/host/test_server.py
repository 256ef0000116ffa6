"""The real ComfyUI over HTTP, as run.py starts it."""

GRAPH = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 8, "height": 4, "batch_size": 1, "color": 0xFF0000},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "test"}},
}


def test_pack_is_loaded_with_its_folder_name(server):
    assert "demo" in server.get("/workflow_templates")["fewstep"]


def test_draw_returns_the_picture(server):
    (png,) = server.draw(GRAPH, on_step=print)
    assert png.startswith(b"\x89PNG")
