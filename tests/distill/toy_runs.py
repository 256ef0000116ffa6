"""Runs of a toy data set, from JSON files."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import torch
from fewstep.distill import commands
from fewstep.distill.model import FlowModel
from fewstep.flow import find_preset, preset_to_metadata
from fewstep.quant import write_gguf
from fewstep.tests.distill import toys

SIZES = {"depth": 1, "text_width": 32, "text_heads": 2, "t5_pieces": 8, "batch": 4, "warmup": 2}
STUDENT = {"batch": 4, "warmup": 2}
MATCH = STUDENT | {"proxy_warmup": 0}


class Toy:
    """A data set whose every picture is a gray square, and whose score is a weight's size."""

    vocabulary, widths = tuple(toys.WORDS), (1,) * 8

    def batch(self, size, encoders, index):
        latents, tokens = toys.data(index, size)
        return latents, tokens[:, :encoders]

    def mended(self, latents, index):
        return latents + index

    def styled(self, style, size, encoders, index):
        return self.batch(size, encoders, index)[1], lambda latents: latents - 1

    def sheet(self, model, sigmas, cfg, encoders="no t5"):
        said = sum(map(len, (encoders, str(cfg)))) + model.mmdit.final_layer.linear.weight.norm()
        return np.full((8, 8, 3), int(said), np.uint8)

    def evaluate(self, model, sigmas, cfg, captions, encoders, choosing=False):
        score = model.mmdit.final_layer.linear.weight.norm().item()
        chosen = {"choosing": float(choosing), "steps drawn": len(sigmas) - 1}
        return {"overall": score, "right": score / 2, **chosen}

    def quantised(self, model, recipe):
        model.mmdit.final_layer.linear.weight.mul_(int(recipe.removeprefix("flash-")))
        return model

    def prove(self, name, steps, captions):
        return ({"name": name, "steps": n, "overall": 1 / 3, "captions": captions} for n in steps)

    def through_host(self, folders, turns, pictures):
        assert all((folder / "drawn.gguf").exists() for folder in folders)
        taken = [[(2.0 + n, 1.5), (9.0, 2.5), (1.0, 0.5)] for n in range(len(folders))]
        return [[(pictures * a, pictures * b) for a, b in turns] for turns in taken]

    def shipped(self, name, config):
        torch.manual_seed(len(name))
        preset = find_preset("sd3.5-flash-experimental")
        preset = preset if name == "student" else replace(preset, cfg=2.0)
        return FlowModel(config, self.vocabulary), preset

    def export(self, model, preset, folder, recipe, file):
        folder.mkdir()
        (folder / "drawn.gguf").touch()
        path = folder / f"{preset.name.removeprefix('fewstep-')}.gguf"
        weight = model.mmdit.final_layer.linear.weight.detach()
        write_gguf(path, "sd3", preset_to_metadata(preset), [("final.weight", weight)])
        return [path]


def write(folder, name, stage, settings, **others):
    described = {"stage": stage, "samples": 8, "settings": settings, **others}
    (folder / f"{name}.json").write_text(json.dumps(described))


def options(folder, name, command, **others):
    given = {"command": command, "config": folder / f"{name}.json", "name": None, "set": []}
    rest = {"dry_run": False, "folder": folder, "device": "cpu", "sheet_minutes": 0.0}
    return Namespace(**given, **rest, **others)


def run_all(folder):
    commands.train(options(folder, "teacher", "teacher"), Toy())
    commands.train(options(folder, "first", "trajectory"), Toy())
    commands.train(options(folder, "second", "match"), Toy())
    commands.split(options(folder, "third", "split"), Toy())
