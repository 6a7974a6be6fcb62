import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detector.errors import ImageError
from detector.images import ImageSpec, decode, encode_png, from_raw

GREY, COLOUR = ImageSpec(4, 6, 1), ImageSpec(4, 6, 3)


def file_of(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_pixels_survive_a_png_and_a_raw_round_trip(height, width, channels, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    spec = ImageSpec(height, width, channels)

    assert np.array_equal(decode(encode_png(pixels), spec).pixels, pixels)
    assert np.array_equal(from_raw(pixels.tobytes(), height, width, channels, spec).pixels, pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_each_kind_of_file_is_read(kind):
    pixels = np.full((4, 6, 3), 100, np.uint8)

    decoded = decode(file_of(pixels, kind), COLOUR)

    assert np.abs(decoded.pixels.astype(int) - 100).max() <= 2
    assert not decoded.resized


def test_another_size_is_resized_only_if_the_spec_says_so_and_then_said():
    content = file_of(np.zeros((8, 12), np.uint8))

    resized = decode(content, ImageSpec(4, 6, 1, resize=True))

    assert resized.resized
    assert resized.pixels.shape == (4, 6, 1)
    with pytest.raises(ImageError, match="expected 4 x 6 pixels, got 8 x 12"):
        decode(content, GREY)


def bomb_png():
    """A valid header of a 40,000 x 40,000 image, and next to nothing behind it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        (b"", GREY, "expected an image file, got 0 bytes"),
        (
            b"I am a text file called photo.png",
            GREY,
            "expected a JPEG, PNG or WebP file, got 33 bytes of something else",
        ),
        (
            file_of(np.arange(24, dtype=np.uint8).reshape(4, 6))[:-25],
            GREY,
            "expected a whole image file, got a damaged one",
        ),
        (bomb_png(), GREY, "expected at most"),
        (
            file_of(np.zeros((4, 6, 3), np.uint8)),
            GREY,
            r"expected 1 channel \(4 x 6 grey\), got a colour image \(RGB\)",
        ),
        (
            file_of(np.zeros((4, 6), np.uint8)),
            COLOUR,
            r"expected 3 channels \(4 x 6 RGB\), got an image without colour",
        ),
        (file_of(np.zeros((5, 6), np.uint8)), GREY, "expected 4 x 6 pixels, got 5 x 6"),
    ],
)
def test_a_bad_file_gets_one_line_that_says_what_was_expected_and_what_came(content, spec, message):
    with pytest.raises(ImageError, match=message) as caught:
        decode(content, spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "shape", "message"),
    [
        (11, (2, 2, 3), "expected 2 x 2 x 3 = 12 bytes of pixels, got 11 bytes"),
        (4, (2, 2, 1), r"expected 3 channels \(4 x 6 RGB\), got 1"),
        (12, (2, 2, 3), "expected 4 x 6 pixels, got 2 x 2"),
        (0, (0, 2, 3), "at least 1"),
        (8, (2, 2, 2), "1 or 3 channels, got 2 x 2 x 2"),
    ],
)
def test_bad_raw_pixels_get_one_line_too(size, shape, message):
    with pytest.raises(ImageError, match=message):
        from_raw(bytes(size), *shape, COLOUR)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200), cut=st.integers(0, 80))
def test_no_bytes_at_all_raise_anything_but_an_image_error(content, cut):
    for candidate in (content, file_of(np.zeros((4, 6), np.uint8))[:cut] + content):
        try:
            assert decode(candidate, GREY).pixels.shape == (4, 6, 1)
        except ImageError:
            continue
