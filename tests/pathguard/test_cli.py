import json
import logging
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_model
from torch import nn

from detector import bundle as bundles
from detector.bundle import NetworkInfo
from detector.datasets import load_splits
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.stages import import_backbone
from pathguard import __version__
from pathguard.cli import main
from pathguard.commands import server
from service.config import MetricsConfig, settings
from service.records.telemetry import Metrics, MetricsServer
from tests.attacks.test_report import fill
from tests.conftest import untrained_bundle


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs one command: exit code, standard output, standard error."""
    # `serve` makes the process's logs its own.
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    monkeypatch.setattr(root, "level", root.level)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["pathguard", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return command


@pytest.fixture
def photos(tmp_path):
    for index in range(40):
        folder = tmp_path / "photos" / ("cat" if index % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index * 6).save(folder / f"{index}.png")
    return tmp_path / "photos"


def test_the_version_and_every_command_with_its_defaults_are_told(run):
    assert run("--version")[1].strip() == __version__
    code, out, _ = run("--help")
    assert code == 0
    verbs = "train decouple attack report fit calibrate evaluate serve upgrade detect bench health"
    for verb in verbs.split():
        assert verb in out
    assert "[default: 40]" in run("train", "--help")[1]


def test_every_setting_of_the_server_is_a_flag_told_with_its_variable_and_default(run):
    code, out, _ = run("serve", "--help")
    told = " ".join(out.replace("│", " ").split())

    assert code == 0
    for setting in settings():
        assert f"--{setting.name.replace('_', '-')} " in told
        assert f"{setting.variable})" in told
    assert "--reload-seconds <float> How often" in told
    assert "(default: 1.0; PATHGUARD_RELOAD_SECONDS)" in told
    assert "(default: off; PATHGUARD_METRICS_PORT)" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--data", "mnist", "--out", "x"), "expected a data set of fashion-mnist, cifar10 or folder:PATH;"),
        (("train", "--data", "folder:nowhere", "--out", "x"), "got no folder nowhere"),
        (("decouple", "--network", "nowhere"), "expected a bundle in nowhere, got no manifest.json"),
        (("attack", "--bundle", "nowhere", "--out", "x", "--recipes", "magic"), "expected a suite (quick, standard,"),
        (("report", "nowhere"), "expected attacked images in nowhere, got no manifest.json; `pathguard attack` makes"),
        (("fit", "--bundle", "nowhere", "--attacks", "x"), "expected a bundle in nowhere"),
        (("serve", "--bundle", "nowhere"), "expected a bundle in nowhere"),
        (("serve", "--bundle", "nowhere", "--host", "0.0.0.0"), "expected a loopback host such as 127.0.0.1, got"),
        (("serve", "--bundle", "nowhere", "--port", "70000"), "expected port of 0 to 65535, got 70000"),
        (("serve", "--models", "nowhere"), "expected a folder of models, got nowhere: No such file or directory"),
        (("serve", "--bundle", "a", "--bundle", "b/a"), "expected bundles whose folders have different names"),
        (("serve", "--bundle", "a", "--tls-key", "k"), "expected tls_certificate and tls_key together, got one"),
        (("serve", "--bundle", "a", "--log-format", "xml"), "expected log_format of text, json, got 'xml'"),
        (("serve", "--bundle", "a", "--access-file", "n"), "expected a file of credentials that can be read, got n"),
        (("serve", "--metrics-port", 0, "--metrics-host", "::"), "expected a loopback metrics_host"),
        (("upgrade", "nowhere"), "expected a bundle in nowhere, got no manifest.json"),
        (("health", "--target", "127.0.0.1:1", "--timeout-seconds", 0.5), "expected a server that is ready at 127"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line_and_exit_code_1(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    code, out, err = run(*arguments)

    assert code == 1
    assert message in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--network", "resnet8", "--resize"), "begun with resize True, got False; give another --out"),
        (("--network", "resnet14"), "begun with network resnet14, got resnet8; give another --out"),
        (("--network", "resnet8", "--pixel-mean", "0.1", "--pixel-std", "0.2"), "pixel_mean [0.1], got None; give"),
    ],
)
def test_weights_that_were_brought_otherwise_are_not_gone_on_with(run, options, message, digits, tmp_path):
    weights, brought = tmp_path / "w.safetensors", tmp_path / "brought"
    save_model(build_network("resnet8", 1, 10), str(weights))
    import_backbone("resnet8", weights, digits, brought)

    code, _, err = run("decouple", *options, "--weights", weights, "--data", "fashion-mnist", "--out", brought)

    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "Missing option '--out'"),
        (("fly",), "No such command 'fly'"),
        (("train", "--out", "x", "--epochs", "0"), "greater than or equal to 1"),
        (("detect", "nowhere.png"), "expected an image file or a folder, got no nowhere.png"),
        (("fit", "--bundle", "a", "--attacks", "b", "--overshoot", "far"), "expected --overshoot of yes, no, auto,"),
        (("detect", "."), "expected images (.jpg, .jpeg, .png, .webp) in ., got none"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_exit_code_2(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    code, _, err = run(*arguments)

    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_unknown_network_lists_the_known_ones(run, photos, tmp_path):
    code, _, err = run(
        "train", "--data", f"folder:{photos}", "--network", "lenet", "--batch", 8, "--out", tmp_path / "b"
    )

    assert code == 1
    assert "expected a network of googlenet, resnet14, " in err
    assert "or package.module:function; got 'lenet'" in err


def test_an_unknown_variable_of_ours_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATHGUARD_PROT", "1")

    code, _, err = run("serve", "--bundle", tmp_path)

    assert code == 1
    assert "got PATHGUARD_PROT; known are PATHGUARD_ACCESS_BURST_SECONDS, " in err


def test_without_a_bundle_the_one_that_ships_is_served_and_where_none_ships_one_is_asked_for(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(server, "SHIPPED", tmp_path / "shipped")

    asked = run("serve")
    (tmp_path / "shipped").mkdir()
    served = run("serve")

    assert "expected --bundle or --models (PATHGUARD_BUNDLE or PATHGUARD_MODELS), got neither" in asked[2]
    assert f"expected a bundle in {tmp_path / 'shipped'}" in served[2]


def test_a_bundle_without_a_detector_is_not_served(run, digits, tmp_path):
    bundle = untrained_bundle(digits)(tmp_path / "bundle")

    code, _, err = run("serve", "--bundle", bundle.folder)

    assert code == 1
    assert "run `pathguard fit`" in err


def test_an_old_bundle_is_upgraded_and_the_schemas_are_told(run, digits, tmp_path):
    bundle = untrained_bundle(digits)(tmp_path / "bundle")
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    del manifest["sizes"]
    manifest = {**manifest, "schema": 1}
    (bundle.folder / "manifest.json").write_text(json.dumps({**manifest, "digest": bundles._digest_of(manifest)}))

    code, out, _ = run("upgrade", bundle.folder, "--json")

    assert code == 0
    assert json.loads(out) == [{"bundle": str(bundle.folder), "schema before": 1, "schema": bundles.SCHEMA}]


def test_json_of_a_training_run_is_all_that_stands_on_standard_output(run, photos, tmp_path):
    arguments = ("--data", f"folder:{photos}", "--network", "resnet8", "--epochs", 1, "--batch", 8, "--limit", 16)

    code, out, _ = run("train", *arguments, "--out", tmp_path / "b", "--json")

    assert code == 0
    assert set(json.loads(out)[0]) == {"accuracy", "images"}


def giving_probabilities(channels, classes):
    return nn.Sequential(build_network("resnet8", channels, classes), nn.Softmax(dim=1))


def test_attacks_warn_in_one_line_of_a_network_that_gives_probabilities(run, photos, tmp_path):
    torch.manual_seed(0)
    name, splits = f"{__name__}:giving_probabilities", load_splits(f"folder:{photos}")
    backbone = giving_probabilities(splits.train.spec.channels, 2)
    info = NetworkInfo(name, splits.train.class_names, splits.train.spec, splits.train.name, splits.train.digest)
    bundle = bundles.begin_bundle(tmp_path / "bundle", info, backbone, {"figures": {}})
    gates = bundles.GatesInfo(0.7, True, "pathguard")
    bundles.add_network(bundle, bundle.folder, gates, decouple(backbone), {"figures": {}})

    code, out, err = run(
        "attack", "--bundle", bundle.folder, "--trust", name, "--recipes", "fgsm,pgd", "--out", tmp_path / "attacks"
    )

    assert code == 0
    assert "pgd" in out
    told = [line for line in err.splitlines() if "probabilities" in line]
    assert len(told) == 1
    assert told[0].startswith("warning: expected logits, got probabilities")
    assert ".py" not in err


def test_a_report_prints_a_table_of_each_split_or_json_and_names_its_page(run, tmp_path):
    fill(tmp_path / "attacks", "fitting")
    fill(tmp_path / "attacks", "test")

    code, out, _ = run("report", tmp_path / "attacks")

    assert code == 0
    assert "split fitting" in out
    assert "50.0%" in out
    assert "page: " in out
    assert (tmp_path / "attacks" / "report" / "index.html").is_file()
    rows = json.loads(run("report", tmp_path / "attacks", "--out", tmp_path / "elsewhere", "--json")[1])
    assert [(row["split"], row["recipe"]) for row in rows][:3] == [
        ("fitting", "pgd"),
        ("fitting", "cw"),
        ("test", "pgd"),
    ]
    assert rows[0]["parameters"]["norm"] == "linf"
    assert (tmp_path / "elsewhere" / "index.html").is_file()


def test_ctrl_c_says_how_to_go_on(run, photos, tmp_path, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("detector.stages.make_backbone", interrupted)

    code, _, err = run("train", "--data", f"folder:{photos}", "--out", tmp_path / "b")

    assert code == 130
    assert "the same command goes on from what is finished" in err


def test_a_missing_library_names_the_extra_that_brings_it(run, photos, tmp_path, monkeypatch):
    def missing(*_args, **_kwargs):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("detector.stages.make_backbone", missing)

    code, _, err = run("train", "--data", f"folder:{photos}", "--out", tmp_path / "b")

    assert code == 1
    assert "expected the package torch, got none; install Pathguard with the extra serve" in err


def test_no_server_is_told_in_one_line(run, photos):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"

    code, _, err = run("detect", photos / "cat" / "1.png", "--target", target, "--timeout-seconds", "0.5")

    assert code == 1
    assert "error: " in err
    assert target in err
    assert "Traceback" not in err


def test_health_beside_a_server_with_metrics_asks_over_http(run, monkeypatch):
    healthy = [True]
    server = MetricsServer(MetricsConfig(port=0), Metrics("1").registry, lambda: healthy[0])
    monkeypatch.setenv("PATHGUARD_METRICS_PORT", str(server.port))
    monkeypatch.setenv("PATHGUARD_METRICS_HOST", "0.0.0.0")

    assert run("health")[:2] == (0, f"127.0.0.1:{server.port} is ready\n")
    healthy[0] = False
    assert run("health")[0] == 1
    server.close()
    assert run("health")[0] == 1


def test_the_clients_commands_import_no_torch():
    script = "import sys, pathguard.cli; assert not {'torch', 'sklearn', 'scipy'} & set(sys.modules)"

    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert finished.returncode == 0, finished.stderr
