"""A T5 that learns first to say what CLIP-L says: an hour's flow matching in a minute.

An MMDiT reads its text tokens as a set. So a new T5 is understood at once if what the MMDiT's
embedder makes of its word is what it makes of the last of CLIP-L's tokens for that word:

    loss = ‖E(T5(text))_j − E(CLIP(text))_{w_0 + … + w_j}‖² / ‖E(CLIP(text))‖²

where w are the tokens that CLIP-L takes for each of T5's; its start token comes first. Only the T5
learns, a new one even where the model has one; E's columns for it, if they are zero as in a model
without T5, are drawn at random. Ours. Flow matching may go on from there; a model that has done so
can be given a better T5 afterwards, for what it draws by CLIP-L does not change.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..host import modules
from .model import CLIP, T5
from .optimize import autocast
from .teacher import TeacherConfig, TeacherTask, t5_alone


class AlignTask(TeacherTask):
    """The alignment as a task for `distill.loop.train`.

    `widths` (pieces,): how many of CLIP-L's tokens each of T5's pieces is; 1 for special ones.
    """

    name = "align"

    def __init__(self, config: TeacherConfig, *args, widths: Sequence[int]):
        super().__init__(t5_alone(config), *args)
        self.widths = torch.tensor(widths)
        self._give_columns()

    def start_from(self, weights: dict[str, Tensor]) -> None:
        rest = {name: value for name, value in weights.items() if not name.startswith("t5.")}
        super().start_from(rest)
        self._give_columns()

    def _give_columns(self) -> None:
        """Give a model that never had a T5 columns to read it by."""
        weight = self.model.mmdit.context_embedder.weight
        own, columns = weight.split(
            [self.config.text_width, weight.shape[1] - self.config.text_width], 1
        )
        if not columns.any():
            draw = torch.Generator().manual_seed(self.config.seed)
            columns.data.copy_(float(own.std()) * torch.randn(columns.shape, generator=draw))
            self.ema["mmdit.context_embedder.weight"].copy_(weight)

    def _loss(self, index: int, progress: float) -> Tensor:
        _, tokens = self.data(index)
        tokens = self._shortened(tokens, index, progress)
        places, tokens = self._places(tokens[:, T5]).to(self.device), tokens.to(self.device)
        embedder = self.model.mmdit.context_embedder
        with autocast(self.device):
            with torch.no_grad():
                wanted = embedder(self.model.text(tokens[:, CLIP])[0]).float()
            said = embedder(modules.encode_t5(self.model.t5, tokens[:, T5])).float()
        wanted = wanted.gather(1, places[:, :, None].expand_as(said))
        return nn.functional.mse_loss(said, wanted) / wanted.square().mean()

    def _places(self, ids: Tensor) -> Tensor:
        """Where CLIP-L's last token for each of T5's (n, t) lies."""
        return self.widths[ids].cumsum(1).clamp(max=ids.shape[1] - 1)
