"""The nodes, by topic. Each file ends with its list; what is listed here is what users see."""

from comfy_api.latest import ComfyExtension, io

from ..host import folders
from . import distilling, loaders, quantizing, sampling, text

NODES = [*loaders.NODES, *text.NODES, *sampling.NODES, *quantizing.NODES, *distilling.NODES]


class FewStepExtension(ComfyExtension):
    """What ComfyUI asks for: the list of nodes, and the LoRAs that ship in its own list."""

    async def on_load(self) -> None:
        folders.offer_loras()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
