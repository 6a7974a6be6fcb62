"""What the files of a deployment promise, and whether they still fit the server."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from service.config import ELSEWHERE, PREFIX, ServiceConfig
from service.records.telemetry import Metrics

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def manifests(folder="base"):
    return {
        (document["kind"]): document
        for file in sorted((KUBERNETES / folder).glob("*.yaml"))
        for document in yaml.safe_load_all(file.read_text())
    }


def pod(folder="base"):
    return manifests(folder)["Deployment"]["spec"]["template"]["spec"]


def container(folder="base"):
    (only,) = pod(folder)["containers"]
    return only


def settings():
    """Names of all variables that the server takes."""
    names = set(ELSEWHERE)
    for field in fields(ServiceConfig):
        default = field.default_factory() if callable(field.default_factory) else field.default
        parts = [f"{field.name}_{inner.name}" for inner in fields(default)] if is_dataclass(default) else [field.name]
        names |= {PREFIX + part.upper() for part in parts}
    return names


def variables():
    """File -> the PATHGUARD_ variables that it sets, with their values."""
    docker = re.findall(r"(PATHGUARD_\w+)=(\S+)", (ROOT / "Dockerfile").read_text())
    return {
        "Dockerfile": dict(docker),
        "compose.yaml": COMPOSE["services"]["pathguard"]["environment"],
        "base": {entry["name"]: entry["value"] for entry in container()["env"]},
        "tls": {entry["name"]: entry["value"] for entry in container("tls")["env"]},
    }


@pytest.mark.parametrize("where", ["Dockerfile", "compose.yaml", "base", "tls"])
def test_every_variable_is_a_setting_of_the_server(where):
    assert set(variables()[where]) <= settings()


@pytest.mark.parametrize("where", ["compose.yaml", "base"])
def test_the_settings_fit_each_other(where, tmp_path):
    given = {**variables()["Dockerfile"], **variables()[where]}
    ServiceConfig.from_environ(given)


def test_every_resource_is_listed_and_named_alike():
    listed = set(manifests()["Kustomization"]["resources"])
    assert listed == {file.name for file in (KUBERNETES / "base").glob("*.yaml")} - {"kustomization.yaml"}
    for document in manifests().values():
        if document["kind"] != "Kustomization":
            assert document["metadata"]["name"] == "pathguard"
            assert document["metadata"]["labels"] == {"app.kubernetes.io/name": "pathguard"}


def test_the_pod_has_no_rights_and_writes_nowhere():
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["securityContext"]["runAsUser"] == 10001
    assert pod()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod()["automountServiceAccountToken"] is False
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all(mount["readOnly"] for mount in container()["volumeMounts"] + container("tls")["volumeMounts"])


def test_the_cluster_puts_no_settings_of_its_own_beside_ours():
    assert pod()["enableServiceLinks"] is False


def test_memory_is_bounded_and_processor_and_memory_are_asked_for():
    resources = container()["resources"]
    assert set(resources["requests"]) == {"cpu", "memory"}
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_probes_ask_over_grpc_and_over_http_where_there_is_tls():
    (port,) = [entry["containerPort"] for entry in container()["ports"] if entry["name"] == "grpc"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["grpc"] == {"port": port}
        assert container("tls")[probe]["grpc"] is None
        assert container("tls")[probe]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert port == ServiceConfig().port


def test_a_stop_has_time_for_the_calls_that_were_taken():
    given = variables()["base"]
    needed = float(given["PATHGUARD_NOTICE_SECONDS"]) + float(given["PATHGUARD_DRAIN_SECONDS"])
    assert pod()["terminationGracePeriodSeconds"] > needed
    compose = ServiceConfig()
    assert int(COMPOSE["services"]["pathguard"]["stop_grace_period"].rstrip("s")) > (
        compose.notice_seconds + compose.drain_seconds
    )


def test_the_autoscaler_scales_the_deployment_by_processor_and_leaves_it_replicas():
    scaler = manifests()["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "pathguard"}
    assert "replicas" not in manifests()["Deployment"]["spec"]
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    assert {metric["resource"]["name"] for metric in scaler["metrics"]} == {"cpu"}


def test_the_queue_scales_beside_the_processor_by_a_metric_that_the_server_has():
    scaler = manifests("queue")["HorizontalPodAutoscaler"]
    assert scaler["metadata"]["name"] == manifests()["HorizontalPodAutoscaler"]["metadata"]["name"]
    processor, queue = scaler["spec"]["metrics"]
    assert processor == manifests()["HorizontalPodAutoscaler"]["spec"]["metrics"][0]
    name = queue["pods"]["metric"]["name"]
    assert name in {metric.name for metric in Metrics("test").registry.collect()}
    assert int(queue["pods"]["target"]["averageValue"]) == 2 * ServiceConfig().max_batch
    assert "../base" in manifests("queue")["Kustomization"]["resources"]


def test_ports_are_the_same_everywhere():
    metrics = variables()["base"]["PATHGUARD_METRICS_PORT"]
    assert {entry["name"]: entry["port"] for entry in manifests()["Service"]["spec"]["ports"]} == {
        "grpc": 50051,
        "metrics": int(metrics),
    }
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == [f"pathguard:{metrics}"]
    assert COMPOSE["services"]["pathguard"]["environment"]["PATHGUARD_METRICS_PORT"] == metrics


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_services_of_compose_have_no_rights_and_are_reached_from_this_machine_only(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in service
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_grafana_takes_no_log_in_and_nobody_can_change_what_it_shows():
    environment = COMPOSE["services"]["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"


def test_the_image_runs_without_root_and_without_a_shell_and_holds_no_attacks():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "USER 10001:10001" in lines
    for word in ("ENTRYPOINT", "CMD"):
        assert all(line.partition(word)[2].strip().startswith("[") for line in lines if line.startswith(word))
    assert not [line for line in lines if line.startswith(("COPY attacks", "COPY . "))]
    allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert "!attacks" not in allowed
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


def test_rules_and_dashboards_ask_for_metrics_that_the_server_has():
    telemetry = (ROOT / "service" / "records" / "telemetry.py").read_text()
    files = [ROOT / "deploy" / "prometheus" / "rules.yml", *(ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")]
    for file in files:
        for name in set(re.findall(r"\b(pathguard_[a-z_]+)\b", file.read_text())):
            bare = re.sub(r"_(total|bucket|sum|count)$", "", name)
            assert f'"{bare}"' in telemetry or f'"{name}"' in telemetry, f"{file.name}: {name}"
