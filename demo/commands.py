"""What `python -m demo` does once ComfyUI is importable; see `__main__` for the options."""

import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

from PIL import Image

from ..distill.teacher import TeacherConfig
from ..flow import preset_from_metadata, uniform
from ..quant import GGUFFile
from . import ladder, recipe
from .evaluate import contact_sheet, draw_pictures, score_captions
from .export import FILES
from .export import export as write_files
from .score import rates
from .shipped import MODELS, load_shipped


def train(options: Namespace) -> None:
    """Train all stages, or one; after the whole training the files are written."""
    minutes = 120.0 if options.minutes is options.samples is None else options.minutes
    stages = [options.only] if options.only else list(recipe.STAGES)
    config = TeacherConfig(compiled=options.compile)
    recipe.train_stages(options.folder, stages, minutes, options.samples, options.device, config)
    if not options.only:
        export(options)


def export(options: Namespace) -> None:
    """Write the three GGUF files from the checkpoints, finished or not."""
    model = recipe.load_flow_model(options.folder / "reflow2.pt")
    vae = recipe.load_vae(options.folder)
    for path in write_files(model, vae, TeacherConfig(), options.models or MODELS):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def score(options: Namespace) -> None:
    """Print the share of right pictures for each kind of caption."""
    models = options.models or MODELS
    model, vae = load_shipped(models, ids=tuple(recipe.vocabulary()))
    model, decoder = model.to(options.device), vae.to(options.device).taesd_decoder
    preset = preset_from_metadata(GGUFFile(models / FILES["mmdit"]).metadata)
    sigmas = preset.sigmas(options.steps)
    options.steps = len(sigmas) - 1
    if options.shift is not None:
        sigmas = uniform(options.steps, options.shift)
    gain = recipe.DECODER_GAIN
    draw = partial(
        draw_pictures, model, lambda z: decoder(z * gain), sigmas=sigmas, cfg=options.cfg
    )
    shown = []
    for kind in options.kinds:
        _, pictures, verdicts = score_captions(
            draw, options.captions, kind, held_out=not options.seen
        )
        shown += pictures[:10]
        parts = "  ".join(f"{name} {share:.1%}" for name, share in rates(verdicts).items())
        print(f"{kind:7} {options.captions} captions, {options.steps} steps: {parts}", flush=True)
    if options.sheet:
        Image.fromarray(contact_sheet(shown)).save(options.sheet)


def quantise(options: Namespace) -> None:
    """Write docs/quantised.md and its picture: the shipped model at 16, 8, 6 and 4 bits."""
    options.docs.mkdir(parents=True, exist_ok=True)
    picture = options.docs / "quantised.png"
    with tempfile.TemporaryDirectory() as folder:
        rungs, original = ladder.climb(options.models or MODELS, Path(folder), options.captions)
    Image.fromarray(ladder.sheet(original, rungs)).save(picture, optimize=True)
    text = ladder.page(rungs, options.captions, picture.name)
    (options.docs / "quantised.md").write_text(text, encoding="utf-8")
    print(text)
