import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cluster import ray_workers, replicas
from cluster.errors import ClusterError
from cluster.leases import Lease, Leases
from cluster.packing import AnswerPacking
from cluster.replicas import Replicas, ReplicaSource, ReplicatedModel, replicated
from detector.bundle import Bundle
from detector.scoring.detector import Detector
from pathguard import Client
from service.batching import seconds_wanted
from service.config import ServiceConfig
from service.errors import ConfigError, ExpiredError, UnavailableError
from service.models.repository import BundleFolders, FoundVersion
from service.server import ModelSource, running_server
from tests.cluster.conftest import WITHOUT_RAY


@pytest.mark.parametrize(("text", "expected"), [("1", (1, 1)), ("2:8", (2, 8))])
def test_replicas_are_a_number_or_a_range(text, expected):
    assert Replicas.parsed(text) == Replicas(*expected)


@pytest.mark.parametrize("text", ["", "0", "3:2", "1:2:3", "a", "-1", "1.5"])
def test_other_replicas_are_refused(text):
    with pytest.raises(ConfigError, match="expected replicas of"):
        Replicas.parsed(text)


class Actor:
    """Stands for the actor of a model: each answer is a value, an error to raise, or a function to call."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.facts = self.detect = self

    def remote(self, *given):
        return self


@pytest.fixture
def calls(monkeypatch):
    """Ray itself, asked about calls of `Actor`; which of them were cancelled."""
    ray = pytest.importorskip("ray", reason=WITHOUT_RAY)
    cancelled = []

    def get(actor, timeout):
        answer = actor.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "cancel", cancelled.append)
    return cancelled


@pytest.fixture
def model_of(fitted_bundle, calls):
    """Makes a model of replicas whose actors are lent in turn; the first one also says what it is."""
    from cluster.replica import ModelHost

    open_leases = []

    def make(*actors):
        facts = ModelHost(".", str(fitted_bundle.folder), "digits", None, "masked").facts()
        actors[0].answers.insert(0, facts)
        lent = iter(actors)

        def ask():
            actor = next(lent, None)
            if actor is None:
                raise RuntimeError("no more replicas")
            return Lease(actor, None)

        open_leases.append(leases := Leases(ask, term_seconds=100.0))
        return ReplicatedModel(leases, "digits", fitted_bundle.folder, None, Replicas(1, 2))

    yield make
    for leases in open_leases:
        leases.close()


@pytest.fixture
def died():
    return pytest.importorskip("ray", reason=WITHOUT_RAY).exceptions.ActorDiedError()


@pytest.fixture
def answered(fitted_bundle):
    """Answers to `ONE` as they come from a replica, of which so many took the whole network."""
    detector = Detector(Bundle(fitted_bundle.folder), engine="masked")
    packing = AnswerPacking(len(detector.class_names), detector.layers)
    return lambda in_full=0: packing.packed(detector.detect(ONE), in_full)


ONE = np.zeros((1, 8, 8, 1), np.uint8)


@pytest.mark.ray
def test_a_batch_whose_replica_died_is_given_to_another_once(model_of, died, answered):
    model = model_of(Actor(died), Actor(answered(in_full=3)))

    assert len(model.detect(ONE).labels) == 1
    assert model.answered_in_full == 3


@pytest.mark.ray
def test_a_batch_that_two_replicas_died_of_is_not_given_to_a_third(model_of, died):
    third = Actor("an answer")
    model = model_of(Actor(died), Actor(died), third)

    with pytest.raises(UnavailableError, match="two replicas were lost"):
        model.detect(ONE)
    assert third.answers == ["an answer"]


@pytest.mark.ray
def test_a_dead_actor_that_is_lent_again_costs_no_second_try(model_of, died, answered):
    dead = Actor(died)
    model = model_of(dead, dead, dead, Actor(answered()))

    assert len(model.detect(ONE).labels) == 1


@pytest.mark.ray
def test_a_replica_out_of_reach_is_asked_again_until_another_is_chosen(model_of, answered):
    from ray.exceptions import ActorUnavailableError

    away = ActorUnavailableError("out of reach", None)
    model = model_of(*[Actor(away) for _ in range(3)], Actor(answered()))

    assert len(model.detect(ONE).labels) == 1


@pytest.mark.ray
def test_a_batch_that_nobody_waits_for_is_taken_back_from_its_replica(model_of, calls):
    from ray.exceptions import GetTimeoutError

    busy = Actor(GetTimeoutError(), GetTimeoutError(), "too late")
    model = model_of(busy)
    left = iter([5.0, 0.1, -1.0])
    token = seconds_wanted.set(lambda: next(left))

    try:
        with pytest.raises(ExpiredError, match="nobody waits"):
            model.detect(ONE)
    finally:
        seconds_wanted.reset(token)

    assert calls == [busy]
    assert busy.answers == ["too late"]


@pytest.fixture(scope="module")
def serving(cluster_address):
    """Ray Serve on the cluster, for all tests that need it."""
    with replicated(cluster_address, Replicas(2, 2)):
        yield


@pytest.fixture
def source_of(cluster_address, serving):
    """Makes sources of models with so many replicas, which end with the test."""
    from ray import serve

    made = []

    def make(least, most):
        made.append(ReplicaSource(cluster_address, Replicas(least, most), None, "masked"))
        return made[-1]

    yield make
    for source in made:
        source.close()
    for name in serve.status().applications:
        serve.delete(name)


def replica_actors():
    import ray

    return [
        ray.get_actor(actor["name"], namespace=actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("SERVE_REPLICA::")
    ]


def running():
    from ray import serve

    (application,) = serve.status().applications.values()
    return application.deployments["model"].replica_states.get("RUNNING", 0)


def two_after_two_at_once(model, callers):
    assert [len(answer.labels) for answer in callers.map(model.detect, [ONE, ONE])] == [1, 1]
    return running() == 2


def until(told):
    return any(told() or time.sleep(0.1) for _ in range(1200))


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(600)
def test_a_killed_replica_loses_no_accepted_call(source_of, fitted_bundle, digits):
    import ray

    images = digits.test.pixels(slice(0, 40))
    expected = Detector(Bundle(fitted_bundle.folder), engine="masked").detect(images)
    source, loaded = source_of(2, 2), []

    def a_replica():
        return replica_actors()[0]

    def an_actor_of_the_model():
        with loaded[0]._leases.one(lambda: 60.0) as lease:
            return lease.actor

    def load(*of):
        loaded.append(source.load(*of))
        return loaded[-1]

    models = ModelSource(BundleFolders([fitted_bundle.folder]), load, source.replicas.most)
    with running_server(models, ServiceConfig(port=0)) as target, Client(target) as client:
        for victim in (a_replica, an_actor_of_the_model):
            assert until(lambda: running() == 2)  # the one that was killed before has been replaced
            begun = threading.Event()

            def ask(place, begun=begun):
                if place == 10:
                    begun.set()
                return client.detect([images[place % 40]], timeout_seconds=60)[0]

            with ThreadPoolExecutor(4) as callers:
                calls = [callers.submit(ask, place) for place in range(120)]
                assert begun.wait(60)
                ray.kill(victim())
                results = [call.result() for call in calls]

            assert [result.label for result in results] == [int(expected.labels[n % 40]) for n in range(120)]
            assert [result.p_value for result in results] == [float(expected.p_values[n % 40]) for n in range(120)]


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(600)
def test_replicas_come_with_load_and_go_after_it_and_a_new_version_is_warm_before_the_old_one_ends(
    source_of, fitted_bundle, monkeypatch
):
    from ray import serve

    monkeypatch.setattr(replicas, "_UP_SECONDS", 0.1)
    monkeypatch.setattr(replicas, "_DOWN_SECONDS", 0.1)
    source, folder = source_of(1, 2), fitted_bundle.folder
    old = source.load(FoundVersion("1", folder, ()), "digits")
    assert running() == 1

    with ThreadPoolExecutor(2) as callers:
        assert until(partial(two_after_two_at_once, old, callers))
    assert until(lambda: running() == 1)

    new = source.load(FoundVersion("2", folder, ()), "digits")  # in the room of the one that went
    assert new.detect(ONE).labels == old.detect(ONE).labels
    monkeypatch.setattr(ray_workers, "_FREED_SECONDS", 0.5)
    with pytest.raises(ClusterError, match="expected a free processor"):
        source.load(FoundVersion("3", folder, ()), "digits")

    del old
    assert until(lambda: len(serve.status().applications) == 1)
    assert len(new.detect(ONE).labels) == 1


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
def test_more_replicas_than_free_processors_are_refused(cluster_address, serving, monkeypatch):
    monkeypatch.setattr(replicas, "connected", lambda address: nullcontext())  # there is one
    monkeypatch.setattr(ray_workers, "_FREED_SECONDS", 0.5)
    too_many = replicated(cluster_address, Replicas(3, 3))

    with pytest.raises(ClusterError, match="expected 3 free processors on the cluster .*, got [0-2] of 2"), too_many:
        pass


def test_replicas_without_a_cluster_are_refused(tmp_path: Path):
    from typer.testing import CliRunner

    from pathguard.cli import app

    ended = CliRunner().invoke(app, ["serve", "--replicas", "2"])

    assert ended.exit_code == 2
    assert "expected --ray beside --replicas, got none" in " ".join(ended.output.split())
