"""Images of any number and form -> requests that a server takes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pathguard.client.errors import InputError
from pathguard.client.results import ImageResult, results_of
from protos.pathguard.v1 import detection_pb2 as pb

ImageInput = bytes | Path | npt.NDArray[np.uint8]
"""An image file's bytes, its path, or `uint8` pixels `(height, width, 1 or 3)`."""

MAX_IMAGES_PER_CALL = 1024
MAX_EXPLAINED_PER_CALL = 16
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# What an image costs in a message beside its pixels: tags, lengths, height, width, channels and its number in a feed.
_IMAGE_OVERHEAD_BYTES = 96
_REQUEST_OVERHEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """The images of one call.

    Attributes:
        messages: the images that go to the server.
        problems: for every image of the part, why it does not go to the server, or None if it does.
    """

    messages: Sequence[pb.Image]
    problems: Sequence[str | None]

    def results(self, response: pb.DetectResponse | None) -> list[ImageResult]:
        """One result for every image of the part; `response` is None if none went to the server."""
        answers = iter(() if response is None else results_of(response))
        return [next(answers) if problem is None else ImageResult(error=problem) for problem in self.problems]


def split(
    images: Iterable[ImageInput], max_message_bytes: int, max_images: int = MAX_IMAGES_PER_CALL
) -> Iterator[Part]:
    """Parts of at most `max_images` and `max_message_bytes`; files are read when their part is made.

    Raises:
        InputError: something is neither bytes, nor a path, nor `uint8` pixels.
    """
    if isinstance(images, bytes | bytearray | str | Path | np.ndarray):
        raise InputError(f"expected several images, such as a list, got one {type(images).__name__}")
    messages: list[pb.Image] = []
    problems: list[str | None] = []
    limit, size = max_message_bytes - _REQUEST_OVERHEAD_BYTES, 0
    for image in images:
        message = _message_of(image)
        if isinstance(message, pb.Image) and message.ByteSize() + _IMAGE_OVERHEAD_BYTES > limit:
            message = f"expected an image of less than {limit} bytes, got {message.ByteSize()}"
        more = message.ByteSize() + _IMAGE_OVERHEAD_BYTES if isinstance(message, pb.Image) else 0
        if len(problems) == max_images or size + more > limit:
            yield Part(messages, problems)
            messages, problems, size = [], [], 0
        if isinstance(message, pb.Image):
            messages.append(message)
            size += more
        problems.append(message if isinstance(message, str) else None)
    if problems:
        yield Part(messages, problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How images shall be judged.

    Attributes:
        model: name of the model; empty for the server's default.
        model_version: its version; empty for the one that the server uses.
        max_false_alarm_rate: largest share of clean images that may be called adversarial; None for the model's.
        include_path: whether results carry their calculation paths.
        uncertain_rate: images with a p-value above `max_false_alarm_rate` but not above this are called uncertain, in
            [max_false_alarm_rate, 1); None for none.
        correct: whether the labels of images that are called adversarial are restored.
        explain: whether results carry their explanations.
    """

    model: str = ""
    model_version: str = ""
    max_false_alarm_rate: float | None = None
    include_path: bool = False
    uncertain_rate: float | None = None
    correct: bool = False
    explain: bool = False

    @property
    def images_per_call(self) -> int:
        """Most images that a server takes in one call."""
        return MAX_EXPLAINED_PER_CALL if self.explain else MAX_IMAGES_PER_CALL

    def request(self, messages: Sequence[pb.Image]) -> pb.DetectRequest:
        """The request for `messages`."""
        return pb.DetectRequest(
            images=messages,
            model=self.model,
            model_version=self.model_version,
            max_false_alarm_rate=self.max_false_alarm_rate,
            include_path=self.include_path,
            uncertain_rate=self.uncertain_rate,
            correct=self.correct,
            explain=self.explain,
        )


def _message_of(image: ImageInput) -> pb.Image | str:
    """The message of `image`, or why it cannot be read."""
    if isinstance(image, Path):
        try:
            return pb.Image(encoded=image.read_bytes())
        except OSError as error:
            return f"expected a file that can be read, got {image}: {error.strerror or error}"
    if isinstance(image, bytes | bytearray | memoryview):
        return pb.Image(encoded=bytes(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise InputError(f"expected uint8 pixels (height, width, channels), got {image.dtype} {image.shape}")
        height, width, channels = image.shape
        return pb.Image(raw=pb.RawPixels(pixels=image.tobytes(), height=height, width=width, channels=channels))
    raise InputError(f"expected an image as bytes, a pathlib.Path or a uint8 array, got {type(image).__name__}")
