"""What a training leaves to be seen."""

import importlib.util
import json

import numpy as np
import torch
from fewstep.distill.loop import Done
from fewstep.distill.watch import Watch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_tensorboard_reads_what_is_written_for_it(tmp_path):
    watch(tmp_path)(Done(25, 800, 12.3), 0.5)
    events = EventAccumulator(str(tmp_path / "events" / "match")).Reload()
    seen = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in ("loss", "matching")}
    assert seen == {"loss": [(25, 0.5)], "matching": [(25, 0.25)]}


def test_without_tensorboard_there_are_no_events(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    watch(tmp_path)(Done(25, 800, 12.3), 0.5)
    assert not (tmp_path / "events").exists() and (tmp_path / "match.jsonl").exists()
