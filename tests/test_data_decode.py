"""Encoded bytes -> RGB: one policy for every kind of image, and a SampleError for whatever is damaged."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from megatron_vlrl.data import decode
from megatron_vlrl.data.decode import decode_image, image_suffix
from megatron_vlrl.errors import SampleError


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("WEBP", "webp"), ("JPEG", "jpg")])
def test_formats_are_told_by_content(kind, suffix):
    data = _encode(_noise(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert image_suffix(data) == suffix
    image = decode_image(data, "k")
    assert (image.mode, image.size) == ("RGB", (24, 16))
    if kind != "JPEG":
        assert np.array_equal(np.asarray(image), np.asarray(_noise()))


def test_grey_and_palette_become_rgb():
    grey = _noise("L")
    pixels = np.asarray(decode_image(_encode(grey, "PNG"), "k"))
    assert np.array_equal(pixels, np.repeat(np.asarray(grey)[:, :, None], 3, axis=2))
    palette = _noise().quantize(16)
    assert np.array_equal(np.asarray(decode_image(_encode(palette, "PNG"), "k")), np.asarray(palette.convert("RGB")))


def test_transparency_is_laid_over_white():
    ink = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    ink.putpixel((1, 0), (0, 0, 0, 255))
    assert np.asarray(decode_image(_encode(ink, "PNG"), "k")).tolist() == [[[255] * 3, [0] * 3]]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert np.asarray(decode_image(_encode(deep, "PNG"), "k"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    assert decode_image(_encode(_noise(), "JPEG", exif=exif), "k").size == (24, 16)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (10, 200)]
    data = _encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, "k").getpixel((0, 0)) == (10, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_cut_short_is_a_sample_error(kind):
    data = _encode(_noise(), kind)
    for size in (0, 1, 12, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(SampleError, match="sample 'the-key'"):
            decode_image(data[:size], "the-key")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_any_damage_gives_pixels_or_a_sample_error(kind):
    data = _encode(_noise(), kind)
    random = np.random.default_rng(1)
    refused = 0
    for trial in range(1500):
        bad = bytearray(data[: random.integers(8, len(data) + 1)] if trial % 4 == 0 else data)
        for at in random.integers(0, len(bad), random.integers(1, 6)):
            bad[at] = random.integers(0, 256)
        try:
            assert decode_image(bytes(bad), "k").mode == "RGB"
        except SampleError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", _encode(_noise(), "GIF"), _encode(_noise(), "TIFF")])
def test_other_formats_are_refused(data):
    assert image_suffix(data) is None
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode_image(data, "k")


def test_giants_are_refused_by_their_header(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 24 * 16 - 1)
    data = _encode(_noise(), "PNG")
    with pytest.raises(SampleError, match="24x16 pixels is over the limit of 383"):
        decode_image(data, "k")
    with pytest.raises(SampleError, match="over the limit"):  # the pixels are never reached: they are not even there
        decode_image(data[:60], "k")


def test_a_decompression_bomb_is_a_sample_error():
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    import zlib

    bomb = (
        header + zlib.crc32(header[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    )
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode_image(bomb, "k")
