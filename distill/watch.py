"""What can be seen of a training: a line of JSON now and then, TensorBoard's events, sample sheets.

TensorBoard's are written where the package tensorboard is installed; `tensorboard --logdir FOLDER`
shows them.
"""

import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from .loop import Done


class Watch:
    """Called by `loop.train`: writes below `folder`, named after the run.

    `metrics()` gives what else there is to say of the last step, `sheet()` a picture (h, w, 3)
    uint8, drawn every `sheet_minutes`; None: no sheets.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        metrics: Callable[[], Mapping[str, Tensor]],
        sheet: Callable[[], np.ndarray] | None,
        sheet_minutes: float = 5.0,
    ):
        self.log, self.sheets = folder / f"{name}.jsonl", folder / "sheets" / name
        self.metrics, self.sheet, self.pause = metrics, sheet, 60 * sheet_minutes
        self.drawn, self.events = time.monotonic(), None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(folder / "events" / name)

    def __call__(self, done: Done, loss: float) -> None:
        values = {"loss": loss} | {name: float(value) for name, value in self.metrics().items()}
        row = {"step": done.steps, "samples": done.samples, "seconds": round(done.seconds, 1)}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | values) + "\n")
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, done.steps)
            self.events.flush()
        if self.sheet is not None and time.monotonic() - self.drawn > self.pause:
            self.draw(done)

    def draw(self, done: Done) -> None:
        """Write a sheet, named after the step."""
        self.sheets.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.sheet()).save(self.sheets / f"{done.steps:07d}.png")
        self.drawn = time.monotonic()
