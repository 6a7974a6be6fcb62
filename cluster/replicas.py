"""Models whose work is done by replicas on a Ray cluster: Ray Serve deployments behind handles, no ports of their own.

The server of `service` stays the edge: it checks callers, decodes, forms every batch once, and hands whole batches to
the actors that replicas lend it. A batch that nobody waits for any more is taken back; one whose replica died is given
to another, once, which changes nothing: a model's answer depends on the pixels alone.
"""

import logging
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.connection import connected
from cluster.errors import ClusterError
from cluster.leases import TERM_SECONDS, Lease, Leases
from cluster.packing import AnswerPacking, packed_pixels
from cluster.ray_workers import free_processors
from cluster.replica import Facts, Replica
from detector.errors import DetectorError
from detector.images import Pixels
from detector.interpretation.explanation import Explainer
from detector.scoring.detections import Detections
from service.batching import seconds_wanted
from service.errors import ConfigError, ExpiredError, UnavailableError
from service.models.repository import FoundVersion

log = logging.getLogger(__name__)

# How often somebody looks whether a batch is still wanted, while it runs.
_LOOK_SECONDS = 0.05
# How often Serve looks after a replica.
_HEALTH_SECONDS = 1.0
# Another lease is asked for when one has not come after so long.
_LENT_SECONDS = 10.0
# A replica that is out of reach is asked again after so long, for so long at most.
_AGAIN_SECONDS, _AWAY_SECONDS = 0.1, 10.0
# How long load has to last for another replica to be begun, and idleness for one to be ended.
_UP_SECONDS, _DOWN_SECONDS = 3.0, 60.0


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas a model has.

    Attributes:
        least: at all times, at least 1.
        most: under load.
    """

    least: int
    most: int

    @classmethod
    def parsed(cls, text: str) -> "Replicas":
        """`2`, or `2:8` for 2 to 8 by load.

        Raises:
            ConfigError: it is neither.
        """
        parts = text.split(":")
        if len(parts) > 2 or not all(part.isascii() and part.isdecimal() for part in parts):
            raise ConfigError(f"expected replicas of N or MIN:MAX, got {text!r}")
        least, most = int(parts[0]), int(parts[-1])
        if not 1 <= least <= most:
            raise ConfigError(f"expected replicas of 1 <= MIN <= MAX, got {text!r}")
        return cls(least, most)


class ReplicatedModel:
    """A `service.model.Model` whose replicas do the work; its deployment ends when nobody holds it any more."""

    def __init__(self, leases: Leases, name: str, folder: Path, trusted: str | None, replicas: Replicas) -> None:
        """Asks a replica what it is.

        Args:
            leases: of the deployment.
            name: what callers ask for.
            folder: of the bundle, for explanations.
            trusted: whose code may run to build its network.
            replicas: how many there are.
        """
        self.name = name
        self.brief = False  # the way to a replica has no bound
        self.answered_in_full = 0
        self._leases, self._folder, self._trusted = leases, folder, trusted
        self._explainer: Explainer | None = None
        self._lock = threading.Lock()
        facts: Facts = self._ask("facts")
        self.model_version, self.threshold_version = facts.model_version, facts.threshold_version
        self.spec, self.class_names, self.layers = facts.spec, facts.class_names, facts.layers
        self.max_false_alarm_rate, self.calibration_images = facts.max_false_alarm_rate, facts.calibration_images
        self.restores = facts.restores
        self._packing = AnswerPacking(len(facts.class_names), facts.layers)
        self.engine = f"{facts.engine} in {replicas.least} to {replicas.most} replicas"

    def detect(self, pixels: Pixels) -> Detections:
        """As `Model.detect`.

        Raises:
            ExpiredError: nobody waits for the answers any more.
            UnavailableError: two replicas died of it, one after the other.
        """
        detections, in_full = self._packing.unpacked(self._ask("detect", packed_pixels(pixels)))
        if in_full:
            with self._lock:
                self.answered_in_full += in_full
        return detections

    def restore(
        self, pixels: Pixels, probabilities: npt.NDArray[np.float32], p_values: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        """As `Model.restore`."""
        labels: npt.NDArray[np.int64] = self._ask("restore", pixels, probabilities, p_values)
        return labels

    def explainer(self) -> Explainer:
        """As `Model.explainer`; explanations are made here, beside the replicas.

        Raises:
            ArtifactError: the bundle holds no statistics of paths.
        """
        from detector.bundle import Bundle

        with self._lock:
            if self._explainer is None:
                self._explainer = Explainer(Bundle(self._folder, self._trusted))
            return self._explainer

    def _ask(self, method: str, *given: Any) -> Any:
        from ray.exceptions import ActorUnavailableError, RayActorError

        patience = time.monotonic() + _AWAY_SECONDS
        died = 0
        while True:
            try:
                return self._asked_once(method, *given)
            except ActorUnavailableError as error:
                # Out of reach, and not yet known to be dead: until Serve knows, it may choose the same one again.
                if time.monotonic() > patience:
                    raise UnavailableError(f"replicas were out of reach for {_AWAY_SECONDS:g} s") from None
                lost = error
                time.sleep(_AGAIN_SECONDS)
            except RayActorError as error:
                died += 1
                if died > 1:
                    name = type(error).__name__
                    raise UnavailableError(f"two replicas were lost, one after the other ({name})") from None
                lost = error
            log.warning("model %s: a replica was lost, its batch goes to another: %s", self.name, type(lost).__name__)

    def _asked_once(self, method: str, *given: Any) -> Any:
        import ray
        from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

        wanted = seconds_wanted.get()
        if wanted() <= 0:
            raise ExpiredError("nobody waits for the answer any more")
        with self._leases.one(wanted) as lease:
            answer = getattr(lease.actor, method).remote(*given)
            while True:
                try:
                    return ray.get(answer, timeout=_LOOK_SECONDS)
                except GetTimeoutError:
                    if wanted() <= 0:
                        ray.cancel(answer)
                        self._leases.drop(lease)  # it may compute yet
                        raise ExpiredError("nobody waits for the answer any more") from None
                except RayTaskError as error:
                    if isinstance(cause := getattr(error, "cause", None), DetectorError):
                        raise cause from None
                    raise
                except RayActorError as error:
                    self._leases.drop(lease, lost=not isinstance(error, ActorUnavailableError))
                    raise


class ReplicaSource:
    """Makes models of bundles: each a deployment of its own, so that a new version is warm before the old one ends."""

    def __init__(self, address: str, replicas: Replicas, trusted: str | None, engine: str) -> None:
        """Deploys nothing yet.

        Args:
            address: of the cluster, for messages.
            replicas: of each model.
            trusted: `package.module:function` whose code may run to build a network.
            engine: what runs the networks; empty for the fastest.
        """
        self.replicas = replicas
        self._address, self._trusted, self._engine = address, trusted, engine
        self._leases: weakref.WeakSet[Leases] = weakref.WeakSet()

    def load(self, found: FoundVersion, name: str) -> ReplicatedModel:
        """As `service.models.keeper.Load`.

        Raises:
            ClusterError: the cluster has too few free processors.
            ArtifactError: the bundle cannot be used.
        """
        from ray import serve

        from detector.bundle import Bundle

        folder = found.folder.resolve()
        Bundle(folder, self._trusted).detector_info()  # what is wrong with it is said here, in its own words
        free_processors(self._address, self.replicas.least)
        application = f"{name}-{token_hex(4)}"
        deployment = serve.deployment(
            Replica,
            name="model",
            max_ongoing_requests=2 * self.replicas.most
            + 1,  # leases are never refused: one that ends overlaps a new one
            ray_actor_options={"num_cpus": 1},
            health_check_period_s=_HEALTH_SECONDS,
            graceful_shutdown_wait_loop_s=TERM_SECONDS,  # how often it looks whether its last lease has ended
            logging_config={"enable_access_log": False},
            autoscaling_config={
                "min_replicas": self.replicas.least,
                "max_replicas": self.replicas.most,
                "target_ongoing_requests": 1,
                "metrics_interval_s": TERM_SECONDS,  # to give way to variables, which would be set too late here
                "look_back_period_s": 2 * TERM_SECONDS,
                "upscale_delay_s": _UP_SECONDS,
                "downscale_delay_s": _DOWN_SECONDS,
            },
        )
        bound = deployment.bind(str(Path.cwd()), str(folder), name, self._trusted, self._engine)
        leases = None
        try:
            lending = serve.run(bound, name=application, route_prefix=None).options(method_name="lease", stream=True)
            leases = Leases(partial(_lent, lending))
            self._leases.add(leases)
            model = ReplicatedModel(leases, name, folder, self._trusted, self.replicas)
        except BaseException:
            _end(application, leases)
            raise
        weakref.finalize(model, _end, application, leases)
        return model

    def close(self) -> None:
        """Ends the work of all models."""
        for leases in self._leases:
            leases.close()


@contextmanager
def replicated(
    address: str, replicas: Replicas, trusted: str | None = None, engine: str = ""
) -> Iterator[ReplicaSource]:
    """Within it models can be deployed on a cluster; they end with it.

    Args:
        address: as `cluster.connection.connected` takes it.
        replicas: of each model.
        trusted: `package.module:function` whose code may run to build a network.
        engine: what runs the networks; empty for the fastest.

    Raises:
        ClusterError: the cluster cannot be used, has another Serve instance on it, or too few free processors.
    """
    with connected(address):
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the server has words of its own
        free_processors(address, replicas.least)
        if serve.status().applications:
            raise ClusterError(f"expected no deployments on the cluster {address} beside ours, got some")
        serve.start(proxy_location="Disabled")  # it would open an HTTP port; the edge is ours
        source = ReplicaSource(address, replicas, trusted, engine)
        try:
            yield source
        finally:
            source.close()
            serve.shutdown()


def _lent(lending: Any) -> Lease:
    """Waits for a replica if there is none, but for none that answers no more."""
    call = lending.remote(TERM_SECONDS)
    late = threading.Timer(_LENT_SECONDS, call.cancel)
    late.daemon = True
    late.start()
    try:
        return Lease(next(call), call)
    finally:
        late.cancel()


def _end(application: str, leases: Leases | None) -> None:
    import ray
    from ray import serve

    if leases is not None:
        leases.close()
    if ray.is_initialized():  # else it ended with the connection, and asking would begin a cluster
        with suppress(Exception):
            serve.delete(application, _blocking=False)
