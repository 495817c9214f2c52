"""Encoded image bytes -> pixels, with one policy for training, rollout and evaluation.

The policy: PNG, JPEG and WebP by their content, never by a name; the first frame of an animation; EXIF orientation is
ignored (a rotated picture would move the boxes of its gold answer); transparency is laid over white; 16-bit grey is
scaled to 8 bits. Whatever cannot be decoded whole is a SampleError, so that a bad image costs one sample and not a run.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_vlrl.errors import SampleError

MAX_PIXELS = 1 << 26  # 67 million: more than any camera's picture, less than 200 MB decoded
FORMATS = ("PNG", "JPEG", "WEBP")

# What Pillow raises on damaged bytes: the first three and bombs were seen when bytes were flipped and cut
# (tests/test_data_decode.py), the others come from its parsers of rarer chunks.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def image_suffix(data: bytes) -> str | None:
    """`png`, `jpg` or `webp` by the first bytes, None for anything else. Says nothing about the rest of the file."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


def decode_image(data: bytes, key: str) -> Image.Image:
    """Decode to mode RGB; `key` names the sample in errors.

    Raises SampleError for bytes that are corrupt, cut short, of another format, or of more than MAX_PIXELS pixels
    (which is seen in the header, before memory is taken).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise SampleError(key, f"image of {width}x{height} pixels is over the limit of {MAX_PIXELS} pixels")
            image.load()
            return _rgb(image)
    except UnidentifiedImageError as error:  # Pillow's text names a memory address, which no two runs share
        raise SampleError(
            key, f"image of {len(data)} bytes cannot be decoded: no whole header of a PNG, JPEG or WebP"
        ) from error
    except _DAMAGE as error:
        raise SampleError(key, f"image of {len(data)} bytes cannot be decoded: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ink = image.convert("RGBA")
        paper = Image.new("RGBA", ink.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, ink).convert("RGB")
    return image.convert("RGB")
