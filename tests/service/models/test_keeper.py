import asyncio
import json
import logging
import os
import threading

import pytest

from detector.errors import ArtifactError
from service.config import ModelsConfig
from service.errors import ConfigError, SettingsFileError, UnknownModelError
from service.models.keeper import Keeper
from service.models.registry import Registry
from service.models.repository import BundleFolders
from service.records.telemetry import Metrics
from tests.service.fakes import FakeDetector
from tests.service.waiting import until


class Fake(FakeDetector):
    def __init__(self, name, digest):
        super().__init__()
        self.name, self.model_version = name, digest


def write(folder, digest):
    """A bundle of the fakes: its manifest is its digest; `broken` cannot be loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "partial").write_text(digest)
    (folder / "partial").rename(folder / "manifest.json")


def load(found, name):
    path = found.folder / "manifest.json"
    if not path.is_file():
        raise ArtifactError(f"expected a bundle in {found.folder}, got no manifest.json")
    digest = path.read_text()
    if digest == "broken":
        raise ArtifactError("expected a bundle, got a broken one")
    return Fake(name, digest)


def settings(folder, **values):
    (folder / "serving.json").write_text(json.dumps(values))


class Kept:
    def __init__(self, *bundles, models=None, check=lambda model: None, load=load, **config):
        self.registry, self.metrics = Registry(config.get("default", "")), Metrics("test")
        repository = BundleFolders(bundles, models)
        self.keeper = Keeper(repository, load, check, self.registry, ModelsConfig(**config), self.metrics)

    async def begin(self):
        await self.keeper.begin()
        return self

    async def rest(self):
        """Two looks: a change is seen at the first and taken at the second."""
        await self.keeper.look()
        await self.keeper.look()

    def digest(self, name="", version=""):
        return self.registry.find(name, version).model_version

    def value(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


async def test_single_bundles_are_known_by_their_folders_names_and_the_first_is_the_default(tmp_path):
    write(tmp_path / "shoes", "a")
    write(tmp_path / "bags", "b")
    kept = await Kept(tmp_path / "shoes", tmp_path / "bags").begin()
    assert [(model.name, model.version) for model in kept.registry.all()] == [("shoes", "a"), ("bags", "b")]
    assert (kept.digest(), kept.digest("bags"), kept.digest("bags", "b")) == ("a", "b", "b")
    with pytest.raises(UnknownModelError, match=r"a model that this server has \(shoes, bags\), got 'hats'"):
        kept.digest("hats")
    with pytest.raises(UnknownModelError, match=r"a version of bags that this server has \(b\), got '7'"):
        kept.digest("bags", "7")


async def test_a_folder_of_models_gives_names_and_versions_the_newest_first(tmp_path):
    for version in ("9", "10", "8"):
        write(tmp_path / "shoes" / version, f"digest-{version}")
    write(tmp_path / "bags", "b")
    write(tmp_path / ".hidden", "h")
    kept = await Kept(models=tmp_path, keep_versions=2, default="shoes").begin()
    assert [(model.name, model.version) for model in kept.registry.all()] == [
        ("shoes", "10"), ("shoes", "9"), ("bags", "b"),
    ]  # fmt: skip
    assert (kept.digest(), kept.digest("shoes", "9"), kept.digest("shoes", "digest-9")) == (
        "digest-10", "digest-9", "digest-9",
    )  # fmt: skip
    assert kept.value("pathguard_model_info", model="shoes", version="10", model_version="digest-10",
                      threshold_version="threshold-1") == 1  # fmt: skip


async def test_a_new_version_is_taken_when_its_folder_rests_and_the_oldest_leaves(tmp_path):
    write(tmp_path / "shoes" / "1", "a")
    kept = await Kept(models=tmp_path, keep_versions=1).begin()
    write(tmp_path / "shoes" / "2", "b")
    await kept.keeper.look()
    assert kept.digest() == "a"
    await kept.keeper.look()
    assert kept.digest() == "b"
    with pytest.raises(UnknownModelError):
        kept.digest("shoes", "1")


async def test_a_changed_bundle_takes_the_place_of_the_old_one(tmp_path):
    write(tmp_path / "shoes", "a")
    kept = await Kept(tmp_path / "shoes").begin()
    write(tmp_path / "shoes", "b")
    await kept.rest()
    assert [model.model_version for model in kept.registry.all()] == ["b"]


async def test_a_broken_bundle_is_refused_told_once_and_the_old_one_goes_on(tmp_path, caplog):
    write(tmp_path / "shoes" / "1", "a")
    kept = await Kept(models=tmp_path, keep_versions=1).begin()
    write(tmp_path / "shoes" / "2", "broken")
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            await kept.keeper.look()
    assert kept.digest() == "a"
    assert kept.value("pathguard_model_loads_total", model="shoes", outcome="refused") == 1
    assert kept.value("pathguard_model_refused", model="shoes") == 1
    assert [record.message for record in caplog.records] == [
        f"model shoes 2 in {tmp_path}/shoes/2 is refused: expected a bundle, got a broken one"
    ]
    write(tmp_path / "shoes" / "2", "b")
    await kept.rest()
    assert kept.digest() == "b"
    assert kept.value("pathguard_model_refused", model="shoes") == 0


async def test_a_bundle_that_breaks_in_its_place_leaves_what_was_read_in_service(tmp_path):
    write(tmp_path / "shoes", "a")
    kept = await Kept(tmp_path / "shoes").begin()
    write(tmp_path / "shoes", "broken")
    await kept.rest()
    assert kept.digest() == "a"
    (tmp_path / "shoes" / "manifest.json").unlink()
    await kept.rest()
    assert kept.digest() == "a"


async def test_a_model_that_fails_when_it_is_warmed_up_is_refused(tmp_path):
    def check(model):
        if model.model_version == "b":
            raise RuntimeError("no such layer")

    write(tmp_path / "shoes", "a")
    kept = await Kept(tmp_path / "shoes", check=check).begin()
    write(tmp_path / "shoes", "b")
    await kept.rest()
    assert kept.digest() == "a"


async def test_a_model_that_hangs_when_it_is_loaded_is_refused_after_its_time(tmp_path):
    over = threading.Event()

    def hang(found, name):
        model = load(found, name)
        if model.model_version == "b":
            over.wait()
        return model

    write(tmp_path / "shoes", "a")
    kept = await Kept(tmp_path / "shoes", load=hang, load_seconds=0.2).begin()
    write(tmp_path / "shoes", "b")
    await kept.rest()
    assert kept.digest() == "a"
    assert kept.value("pathguard_model_loads_total", model="shoes", outcome="refused") == 1
    over.set()


async def test_a_pinned_version_is_a_rollback_in_one_line_and_back(tmp_path):
    for version in ("1", "2", "3"):
        write(tmp_path / "shoes" / version, f"digest-{version}")
    kept = await Kept(models=tmp_path, keep_versions=1).begin()
    assert kept.digest() == "digest-3"
    settings(tmp_path / "shoes", version="1")
    await kept.rest()
    assert kept.digest() == "digest-1"
    assert kept.digest("shoes", "3") == "digest-3"
    settings(tmp_path / "shoes")
    await kept.rest()
    assert kept.digest() == "digest-3"


async def test_a_version_taken_away_is_a_rollback_too(tmp_path):
    for version in ("1", "2"):
        write(tmp_path / "shoes" / version, f"digest-{version}")
    kept = await Kept(models=tmp_path).begin()
    (tmp_path / "shoes" / "2").rename(tmp_path / ".away")
    await kept.rest()
    assert kept.digest() == "digest-1"


async def test_the_rate_changes_without_another_load(tmp_path):
    write(tmp_path / "shoes", "a")
    kept = await Kept(tmp_path / "shoes").begin()
    before = kept.registry.find()
    settings(tmp_path / "shoes", max_false_alarm_rate=0.2)
    await kept.rest()
    assert (before.max_false_alarm_rate, kept.registry.find().max_false_alarm_rate) == (0.05, 0.2)
    assert kept.registry.find().model is before.model
    assert kept.value("pathguard_max_false_alarm_rate", model="shoes", version="a") == 0.2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": "7"}', r"expected a version of shoes that can be used \(\), got '7'"),
        ('{"max_false_alarm_rate": 0.001}', "expected a max_false_alarm_rate of at least 0.01 in"),
        ('{"max_false_alarm_rate": 1}', "expected a max_false_alarm_rate between 0 and 1 in"),
        ('{"rate": 0.1}', "expected version and max_false_alarm_rate in"),
        ('{"version": 7}', "expected the version as text in"),
        ("{", "expected JSON in"),
    ],
)
async def test_wrong_settings_stop_the_start_and_later_leave_the_last_good_ones(tmp_path, content, message, caplog):
    write(tmp_path / "shoes", "a")
    (tmp_path / "shoes" / "serving.json").write_text(content)
    with pytest.raises(SettingsFileError, match=message):
        await Kept(tmp_path / "shoes").begin()
    settings(tmp_path / "shoes", max_false_alarm_rate=0.2)
    kept = await Kept(tmp_path / "shoes").begin()
    (tmp_path / "shoes" / "serving.json").write_text(content)
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            await kept.keeper.look()
    assert kept.registry.find().max_false_alarm_rate == 0.2
    assert len(caplog.records) == 1


async def test_a_model_whose_folder_is_gone_leaves_but_not_the_last_one(tmp_path):
    write(tmp_path / "shoes", "a")
    write(tmp_path / "bags", "b")
    kept = await Kept(models=tmp_path).begin()
    (tmp_path / "shoes").rename(tmp_path / ".shoes")
    await kept.keeper.look()
    assert kept.registry.names() == ["bags", "shoes"]
    await kept.keeper.look()
    assert kept.registry.names() == ["bags"]
    (tmp_path / "bags").rename(tmp_path / ".bags")
    await kept.rest()
    assert kept.digest("bags") == "b"


async def test_a_model_that_cannot_be_looked_at_and_one_with_files_that_come_and_go_stay(tmp_path, monkeypatch):
    write(tmp_path / "shoes", "a")
    write(tmp_path / "bags", "b")
    kept = await Kept(models=tmp_path).begin()
    scan = os.scandir

    def failing(folder):
        if folder.name == "shoes":
            raise OSError(5, "Input/output error")
        (folder / "passing").touch()
        entries = scan(folder)
        (folder / "passing").unlink()
        return entries

    monkeypatch.setattr(os, "scandir", failing)
    for _ in range(3):
        await kept.rest()
    assert kept.registry.names() == ["bags", "shoes"]


async def test_a_folder_of_models_that_is_away_changes_nothing(tmp_path, caplog):
    write(tmp_path / "models" / "shoes", "a")
    kept = await Kept(models=tmp_path / "models").begin()
    (tmp_path / "models").rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.ERROR):
        await kept.rest()
    assert kept.digest() == "a"
    assert len(caplog.records) == 1


async def test_a_bundle_named_by_itself_must_be_usable_at_the_start(tmp_path):
    write(tmp_path / "shoes", "broken")
    write(tmp_path / "bags", "b")
    with pytest.raises(ArtifactError, match="got a broken one"):
        await Kept(tmp_path / "shoes", tmp_path / "bags").begin()
    with pytest.raises(ArtifactError, match="expected a bundle in .*nowhere, got no manifest"):
        await Kept(tmp_path / "nowhere").begin()


async def test_of_a_folder_of_models_one_must_be_usable_at_the_start(tmp_path):
    write(tmp_path / "shoes", "broken")
    with pytest.raises(ArtifactError, match="got a broken one"):
        await Kept(models=tmp_path).begin()
    write(tmp_path / "bags", "b")
    assert (await Kept(models=tmp_path).begin()).digest() == "b"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="expected a bundle in the folder of models, got none"):
        await Kept(models=tmp_path / "empty").begin()
    with pytest.raises(ConfigError, match=r"expected a folder of models, got .*nowhere: No such file"):
        await Kept(models=tmp_path / "nowhere").begin()
    with pytest.raises(ConfigError, match="expected models_default of bags, got 'hats'"):
        await Kept(models=tmp_path, default="hats").begin()


def test_bundles_need_different_names(tmp_path):
    with pytest.raises(ConfigError, match="expected bundles whose folders have different names"):
        BundleFolders([tmp_path / "a" / "bundle", tmp_path / "b" / "bundle"])
    with pytest.raises(ConfigError, match="got neither"):
        BundleFolders()


async def test_a_link_is_known_by_its_own_name_and_what_it_points_to_may_change(tmp_path):
    write(tmp_path / "first", "a")
    write(tmp_path / "second", "b")
    (tmp_path / "current").symlink_to("first")
    kept = await Kept(tmp_path / "current").begin()
    assert kept.registry.find().name == "current"
    (tmp_path / "new").symlink_to("second")
    (tmp_path / "new").rename(tmp_path / "current")
    await kept.rest()
    assert kept.digest() == "b"


async def test_it_keeps_looking_even_after_a_look_that_failed(tmp_path, monkeypatch):
    write(tmp_path / "shoes", "a")
    kept = await Kept(tmp_path / "shoes", poll_seconds=0.01).begin()
    look, looks = kept.keeper.look, []

    async def failing_once():
        looks.append(1)
        if len(looks) == 1:
            raise RuntimeError("once")
        await look()

    monkeypatch.setattr(kept.keeper, "look", failing_once)
    task = asyncio.create_task(kept.keeper.keep())
    write(tmp_path / "shoes", "b")
    await until(lambda: kept.digest() == "b")
    task.cancel()
