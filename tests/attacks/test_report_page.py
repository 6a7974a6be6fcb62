from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from attacks.report import summarise
from attacks.report_page import make_report
from attacks.report_pictures import tile
from attacks.store import AttackStore, Origin
from detector.errors import DataError
from tests.attacks.test_report import LINF, NOISE, SMALLEST, fill

VOID = {"meta", "img", "line", "circle", "polyline", "use"}


class Page(HTMLParser):
    """The page's elements, and whether each that was opened was closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks")
    fill(folder, "fitting")
    store = fill(folder, recipes=(("pgd", LINF), ("pgd-2", {**LINF, "budget": 2 / 255}), ("noise", NOISE)))
    return make_report(store, folder / "report")


@pytest.fixture(scope="module")
def page(made):
    return Page(made.page.read_text())


def test_every_split_gets_its_pictures_and_all_get_one_page(made):
    assert [picture.name for picture in made.pictures] == [
        f"{kind}-{split}.png" for split in ("fitting", "test") for kind in ("success", "distance", "contact")
    ]
    for picture in made.pictures:
        with Image.open(picture) as opened:
            assert len(set(opened.convert("L").get_flattened_data())) > 10
    assert made.page.name == "index.html"


def test_the_page_fetches_nothing(page, made):
    sources = [image["src"] for image in page.all("img")]

    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(link["href"].startswith("#") for link in page.all("a"))
    assert not any(name in {"script", "link", "iframe"} for name, _ in page.elements)
    assert "http" not in made.page.read_text()


def test_the_page_can_be_heard_and_walked_through(page):
    assert all(image["alt"].strip() for image in page.all("img"))
    assert all(
        chart.get("aria-hidden") == "true" or (chart["role"] == "img" and "% fooled" in chart["aria-label"])
        for chart in page.all("svg")
    )
    assert {heading["scope"] for heading in page.all("th")} == {"col", "row"}
    assert len(page.all("caption")) == 2
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("meta")[1]["name"] == "viewport"
    assert len(page.all("h1")) == 1
    places = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(places) == len(set(places))
    assert {link["href"].removeprefix("#") for link in page.all("a")} <= set(places)
    assert {curve["href"].removeprefix("#") for curve in page.all("use")} <= set(places)


def test_noise_is_shown_without_a_chart_since_it_aims_at_nothing(page):
    charts = [chart["aria-label"] for chart in page.all("svg") if "aria-label" in chart]

    assert len(charts) == 2 + 2
    assert not any(chart.startswith("noise") for chart in charts)
    assert sum("noise" in image["alt"] for image in page.all("img")) > 1


def test_a_store_of_noise_alone_has_no_chart_of_distances(tmp_path):
    made = make_report(fill(tmp_path, recipes=(("noise", NOISE),)), tmp_path / "report")

    assert [picture.name for picture in made.pictures] == ["success-test.png", "contact-test.png"]


def test_names_are_text_and_never_markup(page):
    assert not page.all("b")
    assert any("<b>frog & newt</b>" in words for words in page.words)


def test_the_table_gives_success_and_distance_in_the_units_of_people(page):
    said = " ".join(page.words)

    assert "L-inf 8 / 255" in said
    assert "50.0%" in said
    assert "6.0" in said  # median of 1, 3, 5, 7, 9 and 11 grey levels


def test_an_unfinished_run_is_reported_and_said_to_be_unfinished(tmp_path):
    store = fill(tmp_path)
    with AttackStore.writing(tmp_path, store.origin) as writing:
        writing.plan({"test": {"pgd": 100}})

    made = make_report(AttackStore(tmp_path), tmp_path / "report")

    assert made.notes[0].startswith("expected 100 images attacked by pgd on the split test, got 12")
    assert "got 12" in made.page.read_text()


def test_attacks_that_never_succeed_are_drawn_too(tmp_path):
    store = fill(tmp_path, recipes=(("cw", SMALLEST),), images=1)
    shard = next(store.read("test", "cw"))
    shard.crafted.fooled[:] = False
    with AttackStore.writing(tmp_path, store.origin) as writing:
        key = next(iter(store.records()))
        writing.note(writing.write(key, shard.ids, shard.labels, shard.crafted, SMALLEST))

    made = make_report(AttackStore(tmp_path), tmp_path / "report")

    assert "0.0% of 1 images fooled" in made.page.read_text()


def test_grey_and_large_images_become_small_tiles(tmp_path):
    fill(tmp_path)
    example = summarise(AttackStore(tmp_path), "test")[0].examples[0]

    assert tile(np.zeros((300, 200, 1), np.uint8), 96).size == (96, 96)
    assert tile(example.clean, 96).size == (96, 96)


def test_a_folder_without_finished_attacks_names_the_command_that_goes_on(tmp_path):
    with AttackStore.writing(tmp_path, Origin("a" * 64, "photos", 0, 5)) as store, pytest.raises(DataError) as caught:
        make_report(store, tmp_path / "report")

    assert "got none yet; run `pathguard attack`" in str(caught.value)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    store = fill(tmp_path)
    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match="expected a folder that can be written, got .*file"):
        make_report(store, tmp_path / "file")
