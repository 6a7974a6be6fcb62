"""`pathguard detect` and `pathguard bench` against a running server."""

import json

import pytest
from PIL import Image

from pathguard.commands.serving import _range
from service.server import running_server
from tests.pathguard.test_cli import run
from tests.service.conftest import QUICK
from tests.service.fakes import FakeDetector

__all__ = ["run"]


@pytest.fixture(scope="module")
def target():
    with running_server(FakeDetector(), QUICK) as target:
        yield target


@pytest.fixture
def photos(tmp_path):
    for value in range(150):
        Image.new("RGB", (4, 4), (value, 0, 0)).save(tmp_path / f"{value:03}.png")
    return tmp_path


def test_a_folder_of_many_files_is_streamed_and_told_in_its_order(run, photos, target):
    code, out, err = run("detect", photos, "--target", target, "--json")
    rows = json.loads(out)
    assert code == 3
    assert [row["score"] for row in rows] == list(range(150))
    assert "detect 150/150, 0 s left, " in err
    assert "adversarial" in err


def test_a_few_files_are_not_and_a_bad_one_among_them_is_told(run, photos, target):
    (photos / "bad.png").write_bytes(b"text")
    code, out, err = run("detect", photos / "010.png", photos / "bad.png", "--target", target, "--json")
    good, bad = json.loads(out)
    assert code == 1
    assert (good["label"], good["verdict"], good["error"]) == ("shoe", "CLEAN", None)
    assert bad["error"].startswith("expected a JPEG, PNG or WebP file")
    assert err == ""


def test_a_stream_can_be_asked_for(run, photos, target):
    code, out, _ = run("detect", photos / "010.png", "--stream", "--target", target, "--json")
    assert (code, json.loads(out)[0]["score"]) == (0, 10.0)


def test_a_range_of_callers_gets_a_row_each(run, photos, target):
    code, out, _ = run("bench", photos, "--target", target, "--concurrency", "1:5:2", "--calls", 6, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [(row["concurrency"], row["calls"], row["steady"]) for row in rows] == [
        (1, 6, None),
        (3, 6, None),
        (5, 6, None),
    ]


def test_a_rate_is_measured_until_it_is_steady_and_the_table_tells(run, photos, target):
    arguments = ("--rate", 50, "--window-seconds", 0.2, "--tolerance", 1, "--images-per-call", 2)
    code, out, _ = run("bench", photos, "--target", target, *arguments)
    assert code == 0
    for column in ("rate", "calls/s", "images/s", "p50 ms", "p90 ms", "p99 ms", "errors", "steady"):
        assert column in out
    assert "yes" in out


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4", [4]),
        ("1:4", [1, 2, 3, 4]),
        ("10:50:20", [10, 30, 50]),
        ("10:45:20", [10, 30]),
        ("0.5:1:0.25", [0.5, 0.75, 1]),
    ],
)
def test_a_range_has_its_end_in_it(text, values):
    assert _range(text, "--rate") == values


@pytest.mark.parametrize("text", ["", "0", "x", "3:1", "1:2:0", "1:2:3:4", "-1", "1:1000000", "nan"])
def test_what_is_no_range_is_refused(run, photos, target, text):
    code, _, err = run("bench", photos, "--target", target, f"--concurrency={text}")
    assert code == 2
    assert "expected --concurrency of NUMBER or START:END[:STEP]" in err


def test_half_a_caller_is_refused(run, photos, target):
    code, _, err = run("bench", photos, "--target", target, "--concurrency", "1:2:0.5")
    assert code == 2
    assert "expected --concurrency of whole numbers, got '1:2:0.5'" in err


def test_callers_and_a_rate_are_not_taken_together(run, photos, target):
    code, _, err = run("bench", photos, "--target", target, "--rate", 1, "--concurrency", 1)
    assert code == 2
    assert "expected --concurrency or --rate, got both" in err


def test_a_token_for_another_machine_wants_encryption(run, photos, monkeypatch):
    monkeypatch.setenv("PATHGUARD_TOKEN", "secret")
    code, _, err = run("detect", photos / "010.png", "--target", "example.org:50051")
    assert code == 1
    assert "expected TLS for a token that goes to another machine" in err
