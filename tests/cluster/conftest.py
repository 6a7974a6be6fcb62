"""One Ray cluster of two nodes with one processor each, closed by a token, for all tests that need one."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

WITHOUT_RAY = "the package ray is not installed (pip install pathguard[ray])"
OBJECT_STORE_BYTES = 100_000_000


@contextmanager
def small_cluster(nodes: int = 2):
    """A cluster of nodes with one processor each; nothing of it is left behind."""
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _closed_to_strangers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if "RAY_ADDRESS" not in os.environ:
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else a busy machine would never come to them
        # Workers import the packages that the tests do.
        root = str(Path(__file__).parents[2])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(scope="session")
def cluster_address(_closed_to_strangers):
    """Of one cluster for all tests: that of RAY_ADDRESS, which has to have two free processors, or a new one."""
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address := os.environ.get("RAY_ADDRESS"):
        yield address
        return
    with small_cluster() as started:
        yield started.address


@pytest.fixture(scope="module")
def workers(cluster_address):
    from cluster.ray_workers import ray_workers

    with ray_workers(cluster_address) as found:
        yield found
