"""FewStep for ComfyUI: few-step distilled flow models from GGUF files.

ComfyUI imports this module at start-up, so nothing runs here: the nodes are imported when the host
asks for them. (A module-level import of `comfy_api` would also break every test that runs without
ComfyUI, since pytest imports this file.)
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's V3 entry point: the extension that lists our nodes."""
    from .nodes import FewStepExtension

    return FewStepExtension()
