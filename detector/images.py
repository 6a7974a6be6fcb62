"""Image files and raw pixels -> `uint8` arrays `(height, width, channels)`.

Clean and attacked images go through this one decoder, offline and when served, so that a detector cannot learn the
file format. Only NumPy and Pillow are needed: torchvision's own decoders do not load beside a CPU-only torch.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from detector.errors import ImageError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP")
CHANNEL_NAMES = {1: "grey", 3: "RGB"}
_MODES = {1: "L", 3: "RGB"}
COLOUR_MODES = frozenset({"RGB", "RGBA", "RGBX", "P", "CMYK", "YCbCr", "LAB", "HSV"})


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What a network takes in.

    Attributes:
        height: rows of pixels.
        width: columns of pixels.
        channels: 1 (grey) or 3 (RGB).
        resize: whether an image of another size is resized (and the answer says so) rather than refused.
    """

    height: int
    width: int
    channels: int
    resize: bool = False

    def __str__(self) -> str:
        return f"{self.height} x {self.width} {CHANNEL_NAMES[self.channels]}"


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One image as the network takes it.

    Attributes:
        pixels: `uint8`, `(height, width, channels)`.
        resized: whether the image came in another size.
    """

    pixels: Pixels
    resized: bool


# Of files of one's own, such as today's cameras make; beyond it Pillow warns of what bursts a memory.
OWN_FILE_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485


def decode(content: bytes, spec: ImageSpec, max_pixels: int = 16_777_216) -> DecodedImage:
    """The pixels of an encoded file (JPEG, PNG or WebP), as `spec` wants them.

    Args:
        content: the bytes of the file.
        spec: the size and channels that the network takes.
        max_pixels: largest height times width, read from the header before anything is decoded.

    Raises:
        ImageError: no image file, damaged, too large, or of a size or colour that `spec` does not take.
    """
    if not content:
        raise ImageError("expected an image file, got 0 bytes")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise ImageError(f"expected at most {max_pixels} pixels, got {width} x {height} = {width * height}")
            _check_colour(opened.mode, spec)
            opened.load()
            image = opened.convert(_MODES[spec.channels])
    except UnidentifiedImageError:
        raise ImageError(f"expected a JPEG, PNG or WebP file, got {len(content)} bytes of something else") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"expected at most {max_pixels} pixels, got many more in the file's header") from None
    except (OSError, SyntaxError, ValueError, EOFError, Warning) as error:
        # Pillow warns of damage that it can read around; where warnings are errors, they come here.
        raise ImageError(f"expected a whole image file, got a damaged one ({_one_line(error)})") from None
    return _fit(image, spec)


def from_raw(content: bytes, height: int, width: int, channels: int, spec: ImageSpec) -> DecodedImage:
    """Raw 8-bit pixels, row by row with channels last, as `spec` wants them.

    Raises:
        ImageError: the byte count, size or channels are not as announced or not as `spec` wants them.
    """
    if height < 1 or width < 1 or channels not in _MODES:
        raise ImageError(
            f"expected height and width of at least 1 and 1 or 3 channels, got {height} x {width} x {channels}"
        )
    expected = height * width * channels
    if len(content) != expected:
        raise ImageError(
            f"expected {height} x {width} x {channels} = {expected} bytes of pixels, got {len(content)} bytes"
        )
    if channels != spec.channels:
        raise ImageError(f"expected {spec.channels} channels ({spec}), got {channels}")
    pixels = np.frombuffer(content, dtype=np.uint8).reshape(height, width, channels)
    if (height, width) == (spec.height, spec.width):
        return DecodedImage(pixels, resized=False)
    return _fit(Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels), spec)


def encode_png(pixels: Pixels) -> bytes:
    """A PNG file of `uint8` pixels `(height, width, 1 or 3)`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _check_colour(mode: str, spec: ImageSpec) -> None:
    if spec.channels == 1 and mode in COLOUR_MODES:
        raise ImageError(f"expected 1 channel ({spec}), got a colour image ({mode})")
    if spec.channels == 3 and mode not in COLOUR_MODES:
        raise ImageError(f"expected 3 channels ({spec}), got an image without colour ({mode})")


def _fit(image: Image.Image, spec: ImageSpec) -> DecodedImage:
    wanted = (spec.width, spec.height)
    resized = image.size != wanted
    if resized:
        if not spec.resize:
            raise ImageError(f"expected {spec.height} x {spec.width} pixels, got {image.height} x {image.width}")
        image = image.resize(wanted, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return DecodedImage(pixels.reshape(spec.height, spec.width, spec.channels), resized)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
