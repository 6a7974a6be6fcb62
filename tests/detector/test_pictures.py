import numpy as np
from PIL import Image

from detector.paths.path_encoding import PathEncoding
from detector.pictures import draw_path_pair


def test_the_picture_is_a_png_that_shows_both_images_and_marks_what_changed(tmp_path):
    bits = np.zeros((2, 40), bool)
    bits[0, :20] = True
    bits[1, 10:30] = True
    pixels = np.full((8, 8, 1), 128, np.uint8)
    file = tmp_path / "new" / "paths.png"

    draw_path_pair(file, pixels, pixels, PathEncoding(bits, {"a": 33, "b": 7}), ("clean", "attacked"), "paths")

    with Image.open(file) as opened:
        colours = {colour for _, colour in opened.convert("RGB").getcolors(10**6)}
    opened_by_attack, closed_by_attack = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)
    assert {opened_by_attack, closed_by_attack} <= colours
