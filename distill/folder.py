"""What a MODEL learns from: a folder of pictures with captions, or a file of prompts.

A picture NAME.png has its caption in NAME.txt beside it. Pictures are cropped in the middle to what
the VAE can encode and the network can cut into patches; which ones, is logged.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..host import text

log = logging.getLogger(__name__)

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
PATCH = 2  # latents' numbers a side that flow models take as one token


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """Each picture of a folder, by name, and its caption.

    Raises: ValueError for a folder without pictures, or a picture without words.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(
            f"{folder} holds no pictures: put {', '.join(sorted(PICTURES))} files there, each with "
            "its caption in a .txt file of the same name"
        )
    return [(path, _caption(path)) for path in paths]


def _caption(picture: Path) -> str:
    path = picture.with_suffix(".txt")
    words = _text(path).strip() if path.exists() else ""
    if not words:
        state = "is empty" if path.exists() else "is missing"
        raise ValueError(
            f"{picture} has no caption: {path.name} {state}. Write what it shows there"
        )
    return words


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # as some editors of Windows mark it
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it so") from error


def prompts(file: Path) -> list[str]:
    """A prompt from each line that is not empty. Raises: ValueError where there is none."""
    lines = [line.strip() for line in _text(file).split("\n")]
    if not any(lines):
        raise ValueError(f"{file} holds no prompts: write one a line")
    return [line for line in lines if line]


def read_picture(path: Path, size: tuple[int, int] | None, multiple: int) -> Tensor:
    """(height, width, 3) in [0, 1], both sides a multiple of `multiple`.

    size: width and height to fill, the rest is cut off; None: the picture's own.
    Raises: ValueError for a file that is no picture, or one too small or too large.
    """
    try:
        picture = _rgb(path, ImageOps.exif_transpose(Image.open(path)))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's
        raise ValueError(
            f"{path} is no picture that can be read: replace or remove it ({error})"
        ) from error
    width, height = (side // multiple * multiple for side in size or picture.size)
    if not width or not height:
        raise ValueError(f"{path} is {picture.size}: each side needs {multiple} pixels or more")
    if size is not None:
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    elif picture.size != (width, height):
        log.info("%s: cropped from %dx%d to %dx%d", path.name, *picture.size, width, height)
        picture = _middle(picture, width, height)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)


def _rgb(path: Path, picture: Image.Image) -> Image.Image:
    """Pillow cuts 16 bits of grey off at 255."""
    if picture.mode == "F":
        raise ValueError(f"{path} is in floats, of unknown white: save it in 8 or 16 bits")
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def encode_pictures(vae, paths: Sequence[Path], size: tuple[int, int] | None) -> Tensor:
    """Latents (m, channels, h, w) of pictures, by a VAE of the host, as its nodes pass them.

    Raises: ValueError naming two pictures of different sizes, or one whose latent is not finite.
    """
    multiple = PATCH * vae.spacial_compression_encode()
    latents = []
    for path in paths:
        latents.append(vae.encode(read_picture(path, size, multiple)[None]))
        if not latents[-1].isfinite().all():
            raise ValueError(f"the VAE makes NaN or infinity of {path}: get another VAE")
        if latents[-1].shape != latents[0].shape:
            raise ValueError(
                f"{paths[0]} and {path} are of different sizes: pass --size WIDTH HEIGHT, to which "
                "all are scaled and cropped"
            )
    return torch.cat(latents)


def encode_prompts(clip, texts: Sequence[str]) -> list:
    """CONDITIONING of an entry for each text, by a CLIP of the host; T5 where it is loaded."""
    return [text.encode(clip, one)[0] for one in texts]
