"""The forms in which an image comes, whatever the protocol: a file that has to be decoded, or bare pixels."""

from dataclasses import dataclass
from typing import Protocol

from detector.errors import ImageError
from detector.images import DecodedImage, ImageSpec, decode, from_raw


class Source(Protocol):
    """An image as it came."""

    @property
    def encoded_bytes(self) -> int:
        """Size of the file; 0 if there is nothing to decode."""

    def decode(self, spec: ImageSpec, max_pixels: int) -> DecodedImage:
        """The pixels as `spec` wants them.

        Raises:
            ImageError: no content, damaged, larger than `max_pixels`, or not as `spec` wants it.
        """


@dataclass(frozen=True, slots=True)
class FileSource:
    """A JPEG, PNG or WebP file."""

    content: bytes

    @property
    def encoded_bytes(self) -> int:
        """As `Source.encoded_bytes`."""
        return max(1, len(self.content))

    def decode(self, spec: ImageSpec, max_pixels: int) -> DecodedImage:
        """As `Source.decode`."""
        return decode(self.content, spec, max_pixels)


@dataclass(frozen=True, slots=True)
class RawSource:
    """Bare 8-bit pixels, row by row with channels last, and the size that the caller says they have."""

    content: bytes
    height: int
    width: int
    channels: int

    @property
    def encoded_bytes(self) -> int:
        """As `Source.encoded_bytes`."""
        return 0

    def decode(self, spec: ImageSpec, max_pixels: int) -> DecodedImage:
        """As `Source.decode`; what has no file around it cannot be larger than it was when it came."""
        return from_raw(self.content, self.height, self.width, self.channels, spec)


@dataclass(frozen=True, slots=True)
class NoSource:
    """An image without content."""

    @property
    def encoded_bytes(self) -> int:
        """As `Source.encoded_bytes`."""
        return 0

    def decode(self, spec: ImageSpec, max_pixels: int) -> DecodedImage:
        """Fails."""
        raise ImageError("expected encoded or raw content, got an image with neither")
