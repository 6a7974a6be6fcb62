"""Images as files, for commands that take them."""

from pathlib import Path

from detector.images import Pixels, encode_png


def written(images: Pixels, folder: Path) -> Path:
    """`folder`, with each image as a PNG in it: 0.png, 1.png and on."""
    folder.mkdir()
    for place, pixels in enumerate(images):
        (folder / f"{place}.png").write_bytes(encode_png(pixels))
    return folder
