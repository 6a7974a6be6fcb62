import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from attacks.adaptive.defence import defence_of
from attacks.evaluation.adaptive import withstand
from attacks.evaluation.protocol import Trial
from attacks.negatives import noise_like
from attacks.recipes import RECIPES
from attacks.stages import make_attacks, make_detector
from attacks.store import AttackStore
from cluster import ray_workers
from cluster.errors import ClusterError
from detector.bundle import Bundle
from detector.errors import DataError
from detector.paths.encodings import make_encodings
from tests.cluster.conftest import NODE, WITHOUT_RAY

# What Ray warns of while it ends is its own.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def where():
    """Loads nothing; a shard gives itself and the process that ran it, which leaves the other time to begin."""

    def run(shard):
        time.sleep(0.02)
        return shard, os.getpid()

    return run


class Marked:
    """Notes in a folder who begins which shard, and ends its own process at the first try of one of them."""

    def __init__(self, folder: Path, fatal: int) -> None:
        self.folder, self.fatal = folder, fatal

    def __call__(self):
        def run(shard):
            with (self.folder / str(shard)).open("a") as log:
                log.write(f"{os.getpid()}\n")
            if shard == self.fatal and len((self.folder / str(shard)).read_text().split()) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return shard * shard

        return run


def test_results_come_in_order_from_every_worker(workers, tmp_path):
    workers.check_folder(tmp_path)  # both have begun

    found = list(workers.map(where, range(40)))

    assert [shard for shard, _ in found] == list(range(40))
    pids = {pid for _, pid in found}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_attacks_are_the_same_files_as_without_a_cluster(workers, decoupled_bundle, digits, tmp_path):
    recipes = [RECIPES["fgsm"], noise_like(RECIPES["fgsm"])]

    def attack(folder, **how):
        return make_attacks(decoupled_bundle, digits, recipes, folder, 40, 0, 4, lambda _: None, **how)

    figures = attack(tmp_path / "here")
    assert attack(tmp_path / "there", workers=workers) == figures

    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


def test_encodings_are_the_same_files_as_without_a_cluster(workers, decoupled_bundle, digits, tmp_path):
    def encode(folder, **how):
        return make_encodings(decoupled_bundle, digits.test, "test", folder, 16, lambda *_: None, **how)

    figures = encode(tmp_path / "here")
    assert encode(tmp_path / "there", workers=workers) == figures

    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


def test_a_detector_is_the_same_as_without_a_cluster_and_withstands_the_same(workers, fitted_bundle, digits, tmp_path):
    make_attacks(fitted_bundle, digits, [RECIPES["fgsm"]], tmp_path / "attacks", 60, 0, 8, lambda _: None)
    store = AttackStore(tmp_path / "attacks")
    trial = Trial(4, 10, 1, {"adaptive-path": {}}, (4, 8))

    def fitted(name, **how):
        shutil.copytree(fitted_bundle.folder, tmp_path / name)
        return make_detector(Bundle(tmp_path / name), digits, store, "all", 0.3, 0, **how)

    def withstood(**how):
        network = fitted_bundle.network()
        known = defence_of(fitted_bundle, network, digits.validation)
        return withstand(network, digits.test, known, trial, 1.0, 0, **how)

    # Which is the scores of the calibration images; the classifier's file differs from fit to fit in any case.
    assert fitted("there", workers=workers).threshold_digest == fitted("here").threshold_digest
    assert withstood(workers=workers) == withstood()


def test_a_second_cluster_on_one_store_is_refused(workers, decoupled_bundle, digits, tmp_path):
    def intrude(campaign):
        if campaign.done == 1:
            with pytest.raises(DataError, match="expected to be the only writer of"):
                attack()

    def attack(listen=lambda _: None):
        recipe = [RECIPES["fgsm"]]
        make_attacks(decoupled_bundle, digits, recipe, tmp_path / "store", 20, 0, 4, listen, workers=workers)

    attack(intrude)
    assert len(AttackStore(tmp_path / "store").records()) > 2


def test_a_folder_that_workers_do_not_see_is_refused_before_any_work(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: None)  # as on a disk of this machine alone

    with pytest.raises(DataError, match="which one of 2 workers does not see; put it on storage that all nodes share"):
        workers.check_folder(tmp_path)


def test_a_killed_worker_costs_its_own_shards_a_second_run_and_no_others(workers, tmp_path):
    assert list(workers.map(Marked(tmp_path, 7), range(30))) == [shard * shard for shard in range(30)]

    runs = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    killed = runs["7"][0]
    assert {shard for shard, pids in runs.items() if len(pids) > 1} >= {"7"}
    assert all(pids[0] == killed for pids in runs.values() if len(pids) > 1)
    assert all(pids[-1] != killed for shard, pids in runs.items() if len(pids) > 1)


def test_a_worker_that_is_lost_before_it_has_begun_is_told_in_one_line(monkeypatch, tmp_path):
    ray = pytest.importorskip("ray", reason=WITHOUT_RAY)

    def get(look, timeout):
        raise error

    monkeypatch.setattr(ray, "get", get)
    team = ray_workers.RayWorkers(1)
    team._workers = [ray_workers._Worker(MagicMock())]

    error = ray.exceptions.ActorUnavailableError("its node\nwas lost", None)
    with pytest.raises(ClusterError, match=r"^expected workers that begin, got one lost: .*its node was lost.*$"):
        team.check_folder(tmp_path)
    error = ray.exceptions.GetTimeoutError("late")
    with pytest.raises(ClusterError, match="expected workers that begin within 300 s, got none"):
        team.check_folder(tmp_path)


# From here on workers end, and others have to begin.


def test_a_shard_that_kills_every_worker_is_given_up(workers, monkeypatch):
    monkeypatch.setattr(ray_workers, "_LOSSES", 2)

    def load():
        return lambda shard: os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ClusterError, match="expected shard 0 to be run, got 2 workers lost"):
        list(workers.map(load, [0]))


def test_what_a_shard_raises_is_raised_here_in_its_own_words(workers):
    def load():
        def run(shard):
            raise DataError(f"expected another shard, got {shard}")

        return run

    with pytest.raises(DataError, match=r"^expected another shard, got 0$"):
        list(workers.map(load, [0]))


def test_no_free_processor_is_told_at_once(cluster_address, workers, monkeypatch):
    import ray

    monkeypatch.setattr(ray_workers, "_FREED_SECONDS", 0.5)

    class Hog:
        def there(self):
            return True

    workers.close()
    hogs = [ray.remote(num_cpus=1)(Hog).remote() for _ in range(2)]
    ray.get([hog.there.remote() for hog in hogs])
    for _ in range(50):
        if ray.available_resources().get("CPU", 0) < 1:
            break
        time.sleep(0.1)

    with pytest.raises(ClusterError, match=f"expected a free processor on the cluster {cluster_address}, got 0 of 2"):
        ray_workers.free_processors(cluster_address)


@pytest.mark.skipif("RAY_ADDRESS" in os.environ, reason="nodes of a cluster that was given are not for killing")
def test_a_node_lost_without_grace_costs_nothing(request, workers, decoupled_bundle, digits, tmp_path):
    cluster = request.getfixturevalue("cluster")
    recipe = [replace(RECIPES["pgd"], settings={"steps": 20, "step": 0.25, "stop": False})]

    def attack(folder, listen=lambda _: None, **how):
        make_attacks(decoupled_bundle, digits, recipe, folder, 60, 0, 2, listen, **how)

    def lose(campaign):
        if campaign.done == 4:
            cluster.remove_node(doomed, allow_graceful=False)

    attack(tmp_path / "here")
    workers.close()  # their processors go to the others
    doomed, three = cluster.add_node(**NODE), ray_workers.RayWorkers(3)
    try:
        attack(tmp_path / "there", lose, workers=three)
    finally:
        three.close()
        if doomed in cluster.worker_nodes:
            cluster.remove_node(doomed)

    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")
