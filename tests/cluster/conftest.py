"""One Ray cluster of two nodes with one processor each, closed by a token, for all tests that need one."""

import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

WITHOUT_RAY = "the package ray is not installed (pip install pathguard[ray])"
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}


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
def cluster(_closed_to_strangers):
    """Of two nodes, one for all tests; nothing of it is left behind."""
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    started = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        started.add_node(**NODE)
        yield started
    finally:
        started.shutdown()


@pytest.fixture(scope="session")
def cluster_address(request, _closed_to_strangers):
    """That of RAY_ADDRESS, which has to have two free processors, or of a new cluster."""
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    return os.environ.get("RAY_ADDRESS") or request.getfixturevalue("cluster").address


@pytest.fixture(scope="module")
def workers(cluster_address):
    from cluster.ray_workers import ray_workers

    with ray_workers(cluster_address) as found:
        yield found
