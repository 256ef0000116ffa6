"""The host tier has the real ComfyUI, and our nodes/ does not hide its nodes.py."""

from fewstep.tests import in_process


def test_nodes_is_comfyuis_own():
    import nodes

    assert "KSampler" in nodes.NODE_CLASS_MAPPINGS


def test_host_uses_its_own_base_directory():
    import folder_paths

    assert folder_paths.base_path == str(in_process.prepare())
