"""The page in a headless Chromium: two browsers, a keyboard, damaged and large files."""

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.browser import browser, find_chromium
from detector.images import encode_png
from detector.scoring.detector import Detector
from service.config import UiConfig
from service.ui.page_server import PageServer
from service.ui.recent import RecentVerdicts

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
SHOWN = "document.querySelectorAll('.result').length"
PROBLEM = "document.getElementById('problem').hidden ? '' : document.getElementById('problem').textContent"


@pytest.fixture
def address(explained_bundle):
    detector = Detector(explained_bundle, "digits")
    server = PageServer(UiConfig(port=0), 10_000, lambda: detector, RecentVerdicts())
    yield f"http://127.0.0.1:{server.port}/"
    server.close()


@pytest.fixture
def photos(digits):
    return [encode_png(pixels) for pixels in digits.test.pixels(slice(0, 2))]


def test_people_drop_images_attack_them_and_are_told_what_is_wrong(address, photos, tmp_path):
    assert PROGRAM is not None
    with browser(PROGRAM, pages=2) as (first, second):
        for page in (first, second):
            page.show(address)
            page.wait("document.getElementById('model').textContent.startsWith('digits')")
        # Two browsers at once, each with its own image.
        first.drop("one.png", photos[0])
        second.drop("two.png", photos[1])
        for page, name in ((first, "one.png"), (second, "two.png")):
            page.wait(f"{SHOWN} === 1")
            assert page.ask("document.querySelector('.result h2').textContent") == f"{name}: as it came"
            assert page.ask("document.querySelectorAll('.result svg rect').length") >= 2 * 224
            assert page.ask("document.querySelector('.verdict').textContent") in ("clean", "adversarial")
        # By keyboard alone: from the field for files to the button, and the slider on the way.
        first.ask("document.getElementById('drop').focus()")
        for expected in ("method", "levels"):
            first.press("Tab")
            assert first.ask("document.activeElement.id") == expected
        first.press("ArrowRight")
        assert first.ask("document.getElementById('levels-said').textContent") == "9 of 255"
        first.press("Tab")
        assert first.ask("document.activeElement.type") == "submit"
        first.press("Enter")
        first.wait(f"{SHOWN} === 2")
        assert "FGSM with ε = 9 of 255" in first.ask("document.querySelectorAll('.result h2')[1].textContent")
        first.wait("document.querySelectorAll('#recent tr').length >= 3")
        # What cannot be shown is told in a sentence, and the page goes on.
        second.drop("damaged.png", photos[1][:50])
        second.wait(f"({PROBLEM}).startsWith('expected a whole image file')")
        second.drop("large.png", bytes(9 * 2**20))
        second.wait(f"({PROBLEM}) === 'Expected an image file of at most 8 MiB, got 9 MiB.'")
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((20, 20), np.uint8)).save(buffer, "PNG")
        second.drop("size.png", buffer.getvalue())
        second.wait(f"({PROBLEM}) === 'expected 8 x 8 pixels, got 20 x 20'")
        second.drop("two.png", photos[1])
        second.wait(f"{SHOWN} === 1")
        assert second.ask(PROBLEM) == ""
        # A narrow window: nothing runs out of it. An image may be dropped before the page knows the model.
        first.show(address, width=360, height=800)
        first.drop("one.png", photos[0])
        first.wait(f"{SHOWN} === 1")
        assert first.ask("document.documentElement.scrollWidth <= 360")
