import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ClusterError
from cluster.replicas import Replicas, ReplicatedModel, replicated
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


class Handle:
    """A deployment's handle whose replicas do as they are told: each answer is an error to raise or a value."""

    def __init__(self, facts, *answers):
        self.answers, self.facts, self.cancelled = list(answers), self, 0
        self.told = facts
        self.detect = self

    def remote(self, *given):
        return self

    def result(self, timeout_s):
        if self.told is not None:
            told, self.told = self.told, None
            return told
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self):
        self.cancelled += 1


def model_of(fitted_bundle, *answers):
    from cluster.replicas import _Replica

    facts = _Replica(".", str(fitted_bundle.folder), "digits", None, "masked").facts()
    handle = Handle(facts, *answers)
    return handle, ReplicatedModel(handle, "digits", fitted_bundle.folder, None, Replicas(1, 2))


@pytest.fixture
def died():
    return pytest.importorskip("ray", reason=WITHOUT_RAY).exceptions.ActorDiedError()


@pytest.mark.ray
def test_a_batch_whose_replica_died_is_given_to_another_once(fitted_bundle, died):
    answer = object()

    _, model = model_of(fitted_bundle, died, (answer, 3))

    assert model.detect(np.zeros((1, 8, 8, 1), np.uint8)) is answer
    assert model.answered_in_full == 3


@pytest.mark.ray
def test_a_batch_that_two_replicas_died_of_is_not_given_to_a_third(fitted_bundle, died):
    handle, model = model_of(fitted_bundle, died, died, "a third")

    with pytest.raises(UnavailableError, match="two replicas were lost"):
        model.detect(np.zeros((1, 8, 8, 1), np.uint8))
    assert handle.answers == ["a third"]


@pytest.mark.ray
def test_a_replica_out_of_reach_is_asked_again_until_another_is_chosen(fitted_bundle, died):
    from ray.exceptions import ActorUnavailableError

    answer, away = object(), ActorUnavailableError("out of reach", None)

    _, model = model_of(fitted_bundle, away, away, away, (answer, 0))

    assert model.detect(np.zeros((1, 8, 8, 1), np.uint8)) is answer


@pytest.mark.ray
def test_a_batch_that_nobody_waits_for_is_taken_back_from_its_replica(fitted_bundle, died):
    left = iter([5.0, 0.1, -1.0])
    handle, model = model_of(fitted_bundle, TimeoutError(), TimeoutError(), "too late")
    token = seconds_wanted.set(lambda: next(left))

    try:
        with pytest.raises(ExpiredError, match="nobody waits"):
            model.detect(np.zeros((1, 8, 8, 1), np.uint8))
    finally:
        seconds_wanted.reset(token)

    assert handle.cancelled == 1
    assert handle.answers == ["too late"]


def replica_actors():
    import ray

    return [
        ray.get_actor(actor["name"], namespace=actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("SERVE_REPLICA::")
    ]


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(600)
def test_a_killed_replica_loses_no_accepted_call(cluster_address, fitted_bundle, digits):
    import ray

    images = digits.test.pixels(slice(0, 40))
    expected = Detector(Bundle(fitted_bundle.folder), engine="masked").detect(images)
    begun = threading.Event()

    def ask(place):
        if place == 10:
            begun.set()
        return client.detect([images[place % 40]], timeout_seconds=60)[0]

    with replicated(cluster_address, Replicas(2, 2), engine="masked") as source:
        models = ModelSource(BundleFolders([fitted_bundle.folder]), source.load, source.replicas.most)
        with running_server(models, ServiceConfig(port=0)) as target, Client(target) as client:
            with ThreadPoolExecutor(4) as callers:
                calls = [callers.submit(ask, place) for place in range(120)]
                assert begun.wait(60)
                ray.kill(replica_actors()[0])
                results = [call.result() for call in calls]

            assert [result.label for result in results] == [int(expected.labels[n % 40]) for n in range(120)]
            assert [result.p_value for result in results] == [float(expected.p_values[n % 40]) for n in range(120)]

    too_many = replicated(cluster_address, Replicas(3, 3))
    with pytest.raises(ClusterError, match="expected 3 free processors on the cluster .*, got [0-2] of 2"), too_many:
        pass


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(600)
def test_a_new_version_is_warm_before_the_old_one_ends(cluster_address, fitted_bundle, decoupled_bundle):
    from ray import serve

    with replicated(cluster_address, Replicas(1, 1), engine="masked") as source:
        folder = fitted_bundle.folder
        old = source.load(FoundVersion("1", folder, ()), "digits")
        new = source.load(FoundVersion("2", folder, ()), "digits")
        pixels = np.zeros((1, 8, 8, 1), np.uint8)
        assert new.detect(pixels).labels == old.detect(pixels).labels

        with pytest.raises(ClusterError, match="expected a free processor"):
            source.load(FoundVersion("3", folder, ()), "digits")
        del old
        for _ in range(300):
            if len(serve.status().applications) == 1:
                break
            time.sleep(0.1)

        assert len(serve.status().applications) == 1
        assert len(new.detect(pixels).labels) == 1


def test_replicas_without_a_cluster_are_refused(tmp_path: Path):
    from typer.testing import CliRunner

    from pathguard.cli import app

    ended = CliRunner().invoke(app, ["serve", "--replicas", "2"])

    assert ended.exit_code == 2
    assert "expected --ray beside --replicas, got none" in " ".join(ended.output.split())
