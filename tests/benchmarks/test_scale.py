import json
import os

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from attacks.store import AttackStore
from benchmarks import scale
from benchmarks.scale import MANY, PARTS, QUICK, Found, Work
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.workers import IN_PROCESS

BARS = {"attack ratio": 1.8, "encode ratio": 1.8, "local": 15, "differing": 0, "added p50": 2, "lost": 0,
        "unanswered": 0, "memory": 1.1}  # fmt: skip

SMALL = Work("fgsm", 10, 8)


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(scale.main)
    return lambda *given: CliRunner().invoke(app, [*given])


def tiny():
    torch.manual_seed(0)
    return decouple(build_network("resnet8", 3, 2)).eval()


def test_what_was_not_measured_is_null_beside_its_bar(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "_measure", lambda *_: None)

    ended = run("--quick", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())

    assert ended.exit_code == 0
    assert {row["value"] for row in rows} == {row["met"] for row in rows} == {None}
    assert sorted(row["bar"] for row in rows if row["bar"] is not None) == sorted(BARS.values())


@pytest.mark.parametrize(("name", "bar"), BARS.items())
def test_each_bar_is_met_and_missed_on_its_own_side(name, bar):
    def met(value):
        (row,) = (row for row in scale._rows({name: value}, QUICK) if row.value is not None)
        return row.met

    step = 0.01 if name.endswith("ratio") else -0.01
    assert met(bar) is met(bar + step) is True
    assert met(bar - step) is False


def test_parts_are_measured_as_they_are_asked_for(run, monkeypatch):
    asked = []
    monkeypatch.setattr(scale, "_measure", lambda chosen, size, found: asked.append((chosen, size)))

    run("--only", "attack", "--only", "lost", "--quick")
    run()

    assert asked == [({"attack", "lost"}, QUICK), (set(PARTS), scale.WHOLE)]
    assert "expected parts of" in run("--only", "everything").output


def test_a_measurement_is_told_at_once(capsys):
    Found()["p50"] = 1.23456

    assert capsys.readouterr().err == "p50: 1.235\n"


def test_noise_depends_on_the_id_alone():
    images = scale._random(6, 8)

    np.testing.assert_array_equal(
        images.pixels(slice(0, 6))[[4, 1]], images.subset(np.array([4, 1])).pixels(slice(0, 2))
    )
    assert images.pixels(slice(0, 6)).shape == (6, 8, 8, 3)


def test_nearly_all_noise_is_attacked_and_the_same_work_gives_the_same_files(tmp_path):
    network, told = tiny(), []

    seconds = scale._attack(network, tmp_path / "one", 40, IN_PROCESS, SMALL, told.append)
    scale._attack(network, tmp_path / "two", 40, IN_PROCESS, SMALL)

    attacked = sum(len(shard.ids) for shard in AttackStore(tmp_path / "one").read("test", "fgsm"))
    assert attacked > 20
    assert [state.done for state in told if state.record is not None] == list(range(1, -(-attacked // 10) + 1))
    assert seconds > 0
    assert scale._files(tmp_path / "one") == scale._files(tmp_path / "two")


def test_the_memory_of_the_driver_is_read_after_a_thousand_images_and_at_the_end(monkeypatch):
    readings = iter(range(100, 200))
    monkeypatch.setattr(scale, "_resident", lambda: float(next(readings)))
    monkeypatch.setattr(scale, "decouple", lambda network: tiny())
    found, size = Found(), scale.Size(0, 0, 0, 3 * MANY.shard + 1000, 0, 1)

    scale._memory_part(IN_PROCESS, size, found)

    assert found["early MB"] > 100
    assert found["memory"] > 1


class Team:
    """Workers in this process; those of a node that is lost give what a careless store would hold."""

    def __init__(self):
        self.count, self.worker_nodes, self.removed = 1, {"a node"}, []

    def __getattr__(self, name):
        return getattr(IN_PROCESS, name)

    def remove_node(self, node, allow_graceful):
        self.removed.append((node, allow_graceful))


def test_files_of_teams_are_compared_and_their_times_taken_in_turns(monkeypatch):
    size, found = scale.Size(30, 0, 0, 0, 0, 2, SMALL), Found()

    scale._attack_part(tiny(), Team(), Team(), size, found)

    assert found["differing"] == 0
    assert found["attack 1"] > 0
    assert found["attack ratio"] > 0

    files = iter([{"a": b"1", "b": b"2"}, {"a": b"1", "b": b"2"}, {"a": b"1", "b": b"other", "c": b"3"}])
    monkeypatch.setattr(scale, "_files", lambda folder: next(files))
    scale._attack_part(tiny(), Team(), Team(), size, found)
    assert found["differing"] == 2


def test_one_who_is_slow_for_a_while_does_not_count():
    times = {"one": iter([2.0, 20.0, 3.0]), "two": iter([1.0, 10.0, 1.5])}

    assert scale._in_turns([lambda: next(times["one"]), lambda: next(times["two"])], 3) == [3.0, 1.5]


def test_images_that_were_lost_or_are_there_twice_are_counted(monkeypatch):
    size, found, team = scale.Size(60, 0, 0, 0, 0, 1, SMALL), Found(), Team()
    scale._lost_part(tiny(), team, team, size, found)

    assert team.removed == [("a node", False)]
    assert found["lost"] == 0

    everything = AttackStore.read
    monkeypatch.setattr(AttackStore, "read", lambda *of: list(everything(*of))[1:])
    scale._lost_part(tiny(), team, team, size, found)
    assert found["lost"] > 0


def test_workers_are_warm_when_each_has_done_a_shard():
    class Two(Team):
        def __init__(self):
            self.count, self.pids, self.shards = 2, iter([1, 1, 1, 1, 1, 2, 1, 2]), 0

        def map(self, load, shards):
            assert load()(0) == os.getpid()
            self.shards += len(shards)
            return [next(self.pids) for _ in shards]

    scale._warm(two := Two(), "attack", SMALL)

    assert two.shards == 8
