"""The files that ship, drawn by ComfyUI and judged twice: by `score` and by `second_look`."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..host.loading import load_diffusion_model
from . import categories, score, second_look
from .evaluate import drawn
from .export import FILES
from .ladder import Pictures

SCORERS = {"outline": score.look, "hue and radius": second_look.look}


def prove(models: Path, name: str, steps: Sequence[int], captions: int) -> Iterator[dict]:
    """For each number of steps and each scorer what the file `name` below `models` scores, on
    captions kept from training, without T5, with the CFG that it asks for.

    "agree": share of the pictures of which both scorers say the same, right in all or not.
    """
    path = (models / FILES["mmdit"]).with_stem(name)
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    pictures, model = Pictures(models, path), load_diffusion_model(str(path))
    wanted = categories.held_out(captions)
    for number in steps:
        seen = drawn(partial(pictures.draw, model, steps=number), wanted, seed=1)
        judged = {
            scorer: [score.verdict(*look(p), c) for p, c in zip(seen, wanted, strict=True)]
            for scorer, look in SCORERS.items()
        }
        right = np.array([[verdict.right for verdict in each] for each in judged.values()])
        for scorer, verdicts in judged.items():
            yield {
                "name": path.name,
                "sha256": fingerprint,
                "steps": number,
                "cfg": pictures.preset.cfg,
                "captions": captions,
                "scorer": scorer,
                **categories.categories(wanted, verdicts),
                "agree": float((right[0] == right[1]).mean()),
            }
