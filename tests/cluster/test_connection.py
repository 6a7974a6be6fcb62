import os
import platform
import socket
import subprocess
import sys

import pytest

from cluster import connection
from cluster.connection import connected
from cluster.errors import ClusterError


def connect(address):
    with connected(address):
        pass


def test_a_missing_ray_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(ClusterError, match=r"got none; pip install pathguard\[ray\]"):
        connect("auto")


def test_without_the_flag_ray_is_not_imported(tmp_path, decoupled_bundle):
    script = (
        "import sys; from pathguard.commands.options import workers_of\n"
        "with workers_of(None) as workers: assert list(workers.map(lambda: abs, [-1])) == [1]\n"
        "assert 'ray' not in sys.modules and 'cluster' not in sys.modules"
    )
    import pathguard.cli  # noqa: F401 - what the command imports

    subprocess.run([sys.executable, "-c", f"import pathguard.cli\n{script}"], check=True, timeout=100)


@pytest.mark.ray
@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:10001", ":6379", "host:port"])
def test_what_is_no_address_is_refused(address):
    pytest.importorskip("ray", reason="the package ray is not installed")

    with pytest.raises(ClusterError, match="expected --ray of auto, local or HOST:PORT, got"):
        connect(address)


@pytest.mark.ray
@pytest.mark.parametrize("listens", [True, False])
def test_a_cluster_that_does_not_answer_is_told_in_time(listens, monkeypatch):
    pytest.importorskip("ray", reason="the package ray is not installed")
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listens:
            mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"

        with pytest.raises(ClusterError, match=f"expected a Ray cluster at {address}, got no answer within 0.5 s"):
            connect(address)


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("ours", [("2.59.0", platform.python_version()), ("2.60.0", "3.10.4")])
def test_a_cluster_of_another_ray_or_python_is_refused_and_both_are_named(cluster_address, monkeypatch, ours):
    import ray

    # What Ray says of this process when it compares it with the cluster.
    monkeypatch.setattr(ray._private.utils, "compute_version_info", lambda: ours)
    named = f"Ray: {ray.__version__} Python: {platform.python_version()} .*Ray: {ours[0]} Python: {ours[1]}"

    with pytest.raises(ClusterError, match=f"expected the Ray and Python of this process on the cluster .*{named}"):
        connect(cluster_address)


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
def test_a_second_connection_is_refused_and_the_first_one_goes_on(cluster_address):
    import ray

    with connected(cluster_address):
        with pytest.raises(ClusterError, match="expected a process without a connection to a Ray cluster, got one"):
            connect(cluster_address)

        assert ray.get(ray.put("still there")) == "still there"


@pytest.mark.ray
@pytest.mark.filterwarnings("default")
def test_whoever_has_no_token_is_refused(cluster_address):
    script = f"from cluster.connection import connected\nwith connected({cluster_address!r}): pass"
    environ = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=100, check=False
    )

    assert "expected a token that the cluster" in ended.stderr.splitlines()[-1]
