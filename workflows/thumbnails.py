"""The pictures of the workflows under Templates: 512 pixels square, NAME.jpg beside NAME.json; and
the README's.

The demo shows what its model drew. The others show their schedule: a scene at each noise level,
x = (1 - sigma) * picture + sigma * noise.
"""

import io

import numpy as np
from fewstep.demo.captions import parse_caption
from fewstep.demo.scenes import draw
from fewstep.flow import find_preset, parse_sigmas
from PIL import Image, ImageDraw, ImageFont

SIDE = 512
DARK, LIGHT, DIM = "#1b1e24", "#f2f4f8", "#9aa3b2"
DEMO_PROMPTS = [
    "a red circle on a blue background",
    "a yellow star on a black background",
    "a white ring left of a green square on a purple background",
    "three orange triangles on a cyan background",
]


STYLED = ["a red star on a blue background", "a green square on a yellow background"]
README_PROMPTS = [
    *DEMO_PROMPTS[:2],
    "a cyan ring on a gray background",
    "a white cross on a purple background",
    DEMO_PROMPTS[2],
    "an orange star above a cyan square on a white background",
    DEMO_PROMPTS[3],
    "two red circles on a yellow background",
]


def readme(png_files):
    """The README's pictures, four a row, (912, 464) pixels."""
    page = Image.new("RGB", (912, 464), "white")
    return arrange(page, opened(png_files), columns=4, top=0, gap=16)


def demo(png_files):
    """The four pictures, as the model drew them, in a square."""
    return arrange(Image.new("RGB", (SIDE, SIDE), DARK), opened(png_files), columns=2, top=0)


def schedule(title, subtitle, scene, sigmas):
    """Title, subtitle, and the captioned scene at each of `sigmas` (n,), falling to 0."""
    rng = np.random.default_rng(0)
    picture = drawn(scene, rng)
    noise = rng.standard_normal(picture.shape) * 0.3 + 0.5
    tiles = [(1 - sigma) * picture + sigma * noise for sigma in sigmas.tolist()]
    return card(title, subtitle, tiles)


def bits(title, subtitle, scene):
    """Title, subtitle, and the captioned scene, shaded, in ever fewer bits a colour."""
    picture = drawn(scene, np.random.default_rng(0))
    shade = np.linspace(0.35, 1, len(picture))[:, None, None]
    tiles = [np.round(picture * shade * (2**n - 1)) / (2**n - 1) for n in (16, 8, 6, 4, 3, 2)]
    return card(title, subtitle, tiles)


def side_by_side(title, subtitle, png_files):
    """Title, subtitle, and pairs of pictures, each pair as one node laid it out."""
    pairs = map(np.asarray, opened(png_files))
    sides = [half / 255 for pair in pairs for half in np.split(pair, 2, axis=1)]
    return card(title, subtitle, sides, columns=2)


def opened(png_files):
    return [Image.open(io.BytesIO(png)).convert("RGB") for png in png_files]


def drawn(scene, rng):
    """(128, 128, 3) in [0, 1]"""
    return draw([parse_caption(scene)], rng)[0].permute(1, 2, 0).numpy()


def card(title, subtitle, tiles, columns=3):
    """A card of pictures (h, w, 3) in [0, 1] under two lines of text."""
    picture = Image.new("RGB", (SIDE, SIDE), DARK)
    pen = ImageDraw.Draw(picture)
    pen.text((24, 20), title, fill=LIGHT, font=ImageFont.load_default(44))
    pen.text((24, 78), subtitle, fill=DIM, font=ImageFont.load_default(22))
    tiles = [Image.fromarray((255 * tile.clip(0, 1)).astype(np.uint8)) for tile in tiles]
    return arrange(picture, tiles, columns, top=124)


def arrange(card, tiles, columns, top, gap=12):
    """Paste square tiles in rows below `top`, as large as they fit."""
    rows = -(-len(tiles) // columns)
    wide, high = card.width - (columns + 1) * gap, card.height - top - gap * (rows + 1)
    side = min(wide // columns, high // rows)
    left = (card.width - columns * side - (columns - 1) * gap) // 2
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        place = (left + column * (side + gap), top + gap + row * (side + gap))
        card.paste(tile.resize((side, side), Image.Resampling.LANCZOS), place)
    return card


def schedules(typed):
    """Thumbnail of each workflow but the demo; `typed`: the sigmas of the one made by hand."""
    turbo, medium = find_preset("sd3.5-large-turbo"), find_preset("sd3.5-medium-turbo")
    lamp = "a yellow star above a white ring on a blue background"
    return {
        "sd35_few_step": schedule(
            "SD3.5, 4 steps", "three text encoders, T5 optional", lamp, turbo.sigmas()
        ),
        "lora_on_gguf": schedule("LoRA on GGUF", "SD3.5 Medium in 8 steps", lamp, medium.sigmas()),
        "schedule_by_hand": schedule(
            "Schedule by hand",
            "FewStep Schedule, stock sampler",
            DEMO_PROMPTS[1],
            parse_sigmas(typed),
        ),
    }
