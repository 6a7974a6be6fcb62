"""`pathguard interpret` and `pathguard explain`."""

import json
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from PIL import Image

from detector.bundle import Bundle
from detector.scoring.detector import Detector
from pathguard.client import Client
from pathguard.commands import interpretation
from protos.pathguard.v1 import detection_pb2 as pb
from protos.pathguard.v1.detection_pb2_grpc import DetectionServiceStub
from service.server import running_server
from tests.pathguard.conftest import written
from tests.pathguard.test_cli import run
from tests.service.conftest import QUICK

__all__ = ["run"]


@pytest.fixture
def photos(tmp_path, digits):
    return written(digits.test.pixels(slice(0, 3)), tmp_path / "photos")


@pytest.fixture
def local_digits(monkeypatch, digits):
    monkeypatch.setattr(interpretation, "splits_of", lambda *_: digits)


def test_a_bundle_is_given_statistics_and_each_layer_is_told(run, fitted_bundle, local_digits):
    code, out, _ = run("interpret", "--bundle", fitted_bundle.folder, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["layer"] for row in rows] == list(fitted_bundle.network().layers)
    assert Bundle(fitted_bundle.folder).has_usual_paths


def test_the_atlas_is_one_page_that_fetches_nothing(run, fitted_bundle, local_digits, tmp_path):
    code, out, _ = run("interpret", "--bundle", fitted_bundle.folder, "--out", tmp_path / "atlas")
    page = (tmp_path / "atlas" / "index.html").read_text()
    assert code == 0
    assert str(tmp_path / "atlas" / "index.html") in out
    assert [file.name for file in (tmp_path / "atlas").iterdir()] == ["index.html"]
    assert "http" not in page
    assert page.count("<img ") >= 6
    for heading in ("Layers", "Classes", "Paths in the plane", "Combinations of filters"):
        assert f">{heading}</h2>" in page


def test_attacked_images_of_later_shards_are_shown_too(decoupled_bundle, monkeypatch, tmp_path):
    def shard(first, fooled):
        pixels = np.full((100, 8, 8, 1), first, np.uint8)
        crafted = SimpleNamespace(fooled=np.arange(100) < fooled, pixels=pixels)
        return SimpleNamespace(crafted=crafted, labels=np.full(100, first))

    store = SimpleNamespace(
        origin=SimpleNamespace(network=decoupled_bundle.network_digest),
        attacks=lambda _: ["fgsm"],
        read=lambda *_: iter([shard(1, 3), shard(2, 100), shard(3, 100), shard(4, 100)]),
    )
    monkeypatch.setattr("attacks.store.AttackStore", lambda _: store)

    pixels, labels = interpretation._attacked(tmp_path, decoupled_bundle)["fgsm"]

    assert np.bincount(labels).tolist() == [0, 3, 100, 47]
    assert (pixels[:, 0, 0, 0] == labels).all()


def test_an_image_is_explained_for_a_person_and_for_a_program(run, explained_bundle, photos):
    code, out, _ = run("explain", photos / "0.png", "--bundle", explained_bundle.folder)
    assert code in (0, 3)
    for words in ("p-value", "path most like", "nearest usual path", "score", "least usual filters", "margins"):
        assert words in out
    again, out, _ = run("explain", photos, "--bundle", explained_bundle.folder, "--json")
    rows = json.loads(out)
    assert [row["file"] for row in rows] == [str(photos / f"{place}.png") for place in range(3)]
    assert again == (3 if any(row["verdict"] == "ADVERSARIAL" for row in rows) else 0)
    for row in rows:
        assert row["base"] + sum(row["parts"].values()) == pytest.approx(row["score"], abs=1e-4)


def test_a_picture_of_each_explanation_is_drawn(run, explained_bundle, photos, tmp_path):
    run("explain", photos, "--bundle", explained_bundle.folder, "--pictures", tmp_path / "why")
    for place in range(3):
        with Image.open(tmp_path / "why" / f"{place}.png.explained.png") as picture:
            assert picture.width > 800


def test_pictures_beside_the_images_overwrite_none_of_them(run, explained_bundle, photos):
    before = (photos / "0.png").read_bytes()
    _, out, _ = run("explain", photos / "0.png", "--bundle", explained_bundle.folder, "--pictures", photos, "--json")
    assert (photos / "0.png").read_bytes() == before
    assert json.loads(out)[0]["picture"] == str(photos / "0.png.explained.png")
    drawn = (photos / "0.png.explained.png").read_bytes()
    code, _, err = run("explain", photos, "--bundle", explained_bundle.folder, "--pictures", photos)
    assert code == 1
    assert "expected a picture of its own for each image, got" in err
    assert (photos / "0.png.explained.png").read_bytes() == drawn


def test_images_of_one_name_do_not_share_a_picture(run, explained_bundle, photos, tmp_path):
    deeper = photos / "deeper"
    deeper.mkdir()
    (deeper / "0.png").write_bytes((photos / "0.png").read_bytes())
    bundle, why = ("--bundle", explained_bundle.folder), tmp_path / "why"
    run("explain", photos, *bundle, "--pictures", why)
    assert (why / "0.png.explained.png").exists()
    assert (why / "deeper" / "0.png.explained.png").exists()
    code, _, err = run("explain", photos / "0.png", deeper, *bundle, "--pictures", tmp_path / "none")
    assert code == 1
    assert f"for {deeper / '0.png'} and for {photos / '0.png'}" in err
    assert not (tmp_path / "none").exists()


def test_pictures_that_cannot_be_written_are_told_in_one_line(run, explained_bundle, photos, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = run(
        "explain", photos / "0.png", "--bundle", explained_bundle.folder, "--pictures", tmp_path / "file"
    )
    assert code == 1
    assert err.startswith("error: expected to write")
    assert len(err.strip().splitlines()) == 1


def test_every_image_is_adversarial_at_a_rate_near_one(run, explained_bundle, photos):
    code, out, _ = run(
        "explain", photos, "--bundle", explained_bundle.folder, "--max-false-alarm-rate", 0.999, "--json"
    )
    assert code == 3
    assert {row["verdict"] for row in json.loads(out)} == {"ADVERSARIAL"}


def test_a_bad_image_is_told_among_good_ones(run, explained_bundle, photos):
    (photos / "bad.png").write_bytes(b"text")
    code, out, err = run("explain", photos, "--bundle", explained_bundle.folder, "--json")
    rows = json.loads(out)
    assert code == 1
    assert [("error" in row) for row in rows] == [False, False, False, True]
    assert err == ""
    _, _, err = run("explain", photos / "bad.png", "--bundle", explained_bundle.folder)
    assert "bad.png: expected a JPEG, PNG or WebP file" in err


def test_without_statistics_the_command_that_makes_them_is_told(run, fitted_bundle, photos):
    code, _, err = run("explain", photos / "0.png", "--bundle", fitted_bundle.folder)
    assert code == 1
    assert f"run `pathguard interpret --bundle {fitted_bundle.folder}`" in err
    assert len(err.strip().splitlines()) == 1


@pytest.fixture
def target(explained_bundle):
    with running_server(Detector(explained_bundle, "digits"), QUICK) as target:
        yield target


def test_a_server_explains_as_the_bundle_does(run, explained_bundle, photos, target):
    (photos / "bad.png").write_bytes(b"text")
    code, out, _ = run("explain", photos, "--target", target, "--json")
    asked = json.loads(out)
    _, out, _ = run("explain", photos, "--bundle", explained_bundle.folder, "--json")
    own = json.loads(out)
    assert code == 1
    assert len(asked) == len(own) == 4
    for one, other in zip(asked, own, strict=True):
        assert set(one) == set(other)
        for name in set(one) - {"probability", "score", "layers", "least_usual_filters", "parts", "error"}:
            assert (
                one[name] == pytest.approx(other[name], rel=1e-5)
                if isinstance(one[name], float)
                else (one[name] == other[name])
            ), name
    assert "least usual filters" in run("explain", photos / "0.png", "--target", target)[1]


def test_many_images_are_explained_in_several_calls(explained_bundle, digits, target):
    with Client(target) as client:
        results = client.detect(list(digits.test.pixels(slice(0, 20))), explain=True)
    assert all(result.explanation is not None for result in results)


def test_more_images_than_a_call_may_explain_are_refused(digits, target):
    images = [
        pb.Image(raw=pb.RawPixels(pixels=pixels.tobytes(), height=8, width=8, channels=1))
        for pixels in digits.test.pixels(slice(0, 17))
    ]
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
        DetectionServiceStub(channel).Detect(pb.DetectRequest(images=images, explain=True))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 16 images to explain, got 17" in caught.value.details()


def test_a_server_without_statistics_explains_nothing(run, fitted_bundle, photos):
    with running_server(Detector(fitted_bundle, "digits"), QUICK) as target:
        code, _, err = run("explain", photos / "0.png", "--target", target)
    assert code == 1
    assert "expected a model with statistics of paths, got digits without" in err


def test_somebody_must_be_asked(run, photos, monkeypatch):
    monkeypatch.delenv("PATHGUARD_BUNDLE", raising=False)
    code, _, err = run("explain", photos / "0.png")
    assert code == 2
    assert "expected --bundle or --target, got neither" in err
