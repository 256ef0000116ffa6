"""The nodes, by topic. Each file ends with its list; what is listed here is what users see."""

from comfy_api.latest import ComfyExtension, io

from ..host import folders
from . import loaders, sampling, text


class FewStepExtension(ComfyExtension):
    """What ComfyUI asks for: our model folders made known, then the list of nodes."""

    async def on_load(self) -> None:
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*loaders.NODES, *text.NODES, *sampling.NODES]
