"""What a training leaves to be seen."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import torch
from fewstep.distill.loop import Done
from fewstep.distill.watch import Watch
from PIL import Image

METRICS = {"matching": torch.tensor(0.25)}
PICTURE = np.full((4, 6, 3), 7, np.uint8)


def watch(folder, minutes=60.0):
    return Watch(folder, "match", lambda: METRICS, lambda: PICTURE, minutes)


def test_a_line_of_json_for_each_call(tmp_path):
    seen = watch(tmp_path)
    seen(Done(25, 800, 12.34), 0.5)
    seen(Done(50, 1600, 24.0), 0.4)
    first, second = map(json.loads, (tmp_path / "match.jsonl").read_text().splitlines())
    assert first == {"step": 25, "samples": 800, "seconds": 12.3, "loss": 0.5, "matching": 0.25}
    assert second["step"] == 50 and not (tmp_path / "sheets").exists()


def test_a_sheet_when_its_time_has_come(tmp_path):
    watch(tmp_path, minutes=0.0)(Done(25, 800, 12.3), 0.5)
    sheet = tmp_path / "sheets" / "match" / "0000025.png"
    assert np.array_equal(np.asarray(Image.open(sheet)), PICTURE)


def test_tensorboard_is_told_where_it_is_installed(tmp_path, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder):
            told.append(folder)

        def add_scalar(self, *scalar):
            told.append(scalar)

        def flush(self):
            told.append("flushed")

    package, half = ModuleType("tensorboard"), ModuleType("torch.utils.tensorboard")
    package.__spec__, half.SummaryWriter = ModuleSpec("tensorboard", None), Writer
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", half)
    watch(tmp_path)(Done(25, 800, 12.3), 0.5)
    scalars = [("loss", 0.5, 25), ("matching", 0.25, 25)]
    assert told == [tmp_path / "events" / "match", *scalars, "flushed"]
