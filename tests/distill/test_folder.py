"""What a MODEL learns from: folders and files as people have them, and what is wrong with some."""

import logging

import numpy as np
import pytest
import torch
from fewstep.distill import folder
from PIL import Image


class EightfoldVAE:
    """Means of 8 x 8 pixels."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)


def picture(path, size=(32, 32), color=(255, 0, 0), caption="a red square"):
    Image.new("RGB", size, color).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, "utf-8")


def test_pictures_come_with_the_words_beside_them(tmp_path):
    picture(tmp_path / "b.png", caption="b\n")
    picture(tmp_path / "a.JPG", caption=" a ")
    (tmp_path / "notes.md").write_text("not a picture")
    found = folder.captioned(tmp_path)
    assert [(path.name, words) for path, words in found] == [("a.JPG", "a"), ("b.png", "b")]


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path.name} holds no pictures: put .*\.png"):
        folder.captioned(tmp_path)


@pytest.mark.parametrize("caption, state", [(None, "is missing"), (" \n", "is empty")])
def test_a_picture_without_words_is_named(tmp_path, caption, state):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", caption=caption)
    with pytest.raises(ValueError, match=rf"b\.png has no caption: b\.txt {state}"):
        folder.captioned(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_picture_cut_off_is_named(tmp_path, name):
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in (len(whole) // 2, 30, 0):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{name} is no picture that can be read: replace"):
            folder.read_picture(tmp_path / name, None, 16)


def test_grey_of_16_bits_keeps_its_shades_and_floats_are_refused(tmp_path):
    shades = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "a.png")
    pixels = folder.read_picture(tmp_path / "a.png", None, 16)
    assert torch.equal(pixels[..., 1], torch.arange(256).view(16, 16) / 255)
    Image.fromarray(shades.astype(np.float32)).save(tmp_path / "f.png", format="TIFF")
    with pytest.raises(ValueError, match=r"f\.png is in floats, .*save it in 8 or 16 bits"):
        folder.read_picture(tmp_path / "f.png", None, 16)


def test_a_picture_too_large_for_memory_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // 2 - 1)
    with pytest.raises(ValueError, match=r"a\.png is no picture that can be read.*exceeds limit"):
        folder.read_picture(tmp_path / "a.png", None, 16)


def test_a_picture_that_the_vae_makes_nan_of_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(EightfoldVAE, "encode", lambda vae, pixels: pixels.log() - pixels.log())
    with pytest.raises(ValueError, match=r"the VAE makes NaN or infinity of .*a\.png"):
        folder.encode_pictures(EightfoldVAE(), [tmp_path / "a.png"], None)


def test_words_in_another_encoding_are_named(tmp_path):
    picture(tmp_path / "a.png", caption=None)
    (tmp_path / "a.txt").write_bytes("süß".encode("latin-1"))
    for read in (lambda: folder.captioned(tmp_path), lambda: folder.prompts(tmp_path / "a.txt")):
        with pytest.raises(ValueError, match=r"a\.txt is not in UTF-8"):
            read()


def test_odd_sizes_are_cropped_in_the_middle_and_said(tmp_path, caplog):
    odd = Image.new("RGB", (37, 34), (0, 0, 255))
    odd.paste((255, 0, 0), (2, 1, 34, 33))
    odd.save(tmp_path / "odd.png")
    with caplog.at_level(logging.INFO):
        pixels = folder.read_picture(tmp_path / "odd.png", None, 16)
    assert pixels.shape == (32, 32, 3)
    assert torch.equal(pixels, torch.tensor([1.0, 0.0, 0.0]).expand(32, 32, 3))
    assert "odd.png: cropped from 37x34 to 32x32" in caplog.text


def test_pictures_are_scaled_to_one_size_or_refused(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(64, 32))
    paths = sorted(tmp_path.glob("*.png"))
    assert folder.encode_pictures(EightfoldVAE(), paths, (48, 32)).shape == (2, 3, 4, 6)
    with pytest.raises(
        ValueError, match=r"a\.png and .*b\.png are of different sizes: pass --size"
    ):
        folder.encode_pictures(EightfoldVAE(), paths, None)


def test_what_is_no_picture_or_too_small_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png is no picture"):
        folder.read_picture(tmp_path / "text.png", None, 16)
    picture(tmp_path / "small.png", size=(8, 40))
    with pytest.raises(ValueError, match=r"small\.png .* needs 16 pixels or more"):
        folder.read_picture(tmp_path / "small.png", None, 16)


def test_prompts_are_lines(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n a\u2028dog \n", "utf-8-sig")  # as Windows' editors
    assert folder.prompts(tmp_path / "p.txt") == ["a cat", "a\u2028dog"]
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"p\.txt holds no prompts"):
        folder.prompts(tmp_path / "p.txt")
