"""The whole chain by the commands a user types: real images, a tiny network, a real server on a real port."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from attacks.store import AttackStore
from detector.bundle import Bundle
from detector.scoring.detector import Detector
from pathguard.cli import main
from pathguard.client import Client, Verdict


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """scikit-learn's digits as a folder of PNG files, one folder per class."""
    root = tmp_path_factory.mktemp("digits")
    source = load_digits()
    for index, (pixels, label) in enumerate(zip(source.images, source.target, strict=True)):
        folder = root / f"digit-{label}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def pathguard(capsys, monkeypatch, *arguments):
    """The exit code and standard output of one command."""
    monkeypatch.setattr(sys, "argv", ["pathguard", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0, capsys.readouterr().out


@pytest.mark.timeout(240)
def test_from_a_folder_of_photos_to_a_verdict_over_the_wire(photos, tmp_path, capsys, monkeypatch):
    bundle, attacks = tmp_path / "bundle", tmp_path / "attacks"

    def rows(*arguments):
        code, out = pathguard(capsys, monkeypatch, *arguments, "--json")
        assert code == 0
        return json.loads(out)

    few = ("--epochs", 6, "--batch", 64, "--no-flip")
    (backbone,) = rows("train", "--data", f"folder:{photos}", "--network", "resnet8", "--out", bundle, *few)
    (decoupled,) = rows("decouple", "--network", bundle, "--keep", 0.7, *few)
    (attack,) = rows("attack", "--bundle", bundle, "--out", attacks, "--recipes", "fgsm")
    rows("fit", "--bundle", bundle, "--attacks", attacks)
    judged = rows("evaluate", "--bundle", bundle, "--attacks", attacks, "--out", tmp_path / "judged")["tables"]

    assert backbone["accuracy"] > 0.7
    assert decoupled["accuracy"] > 0.5
    assert attack["fooled"] > 0
    (fgsm,) = judged["attacks"]
    assert fgsm["attack"] == "fgsm"
    assert fgsm["AUROC"] == judged["features"][-1]["fgsm"] > 0.6
    assert f"{fgsm['AUROC']:.4f}" in (tmp_path / "judged" / "index.html").read_text()
    assert [row["images"] for row in judged["false_alarms"]][:3] == [
        "clean", "clean, label right", "clean, label wrong",
    ]  # fmt: skip

    environment = {**os.environ, "PATHGUARD_NOTICE_SECONDS": "0"}
    with subprocess.Popen(
        [sys.executable, "-m", "pathguard", "serve", "--bundle", bundle, "--port", "0", "--threads", "1"],
        stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1],
    ) as server:  # fmt: skip
        try:
            target = re.search(r"serving bundle on (\S+)$", server.stdout.readline())[1]
            code, out = pathguard(capsys, monkeypatch, "detect", photos / "digit-3", "--target", target, "--json")
            verdicts = json.loads(out)
            shard = next(AttackStore(attacks).read("test", "fgsm"))
            with Client(target) as client:
                results = client.detect(list(shard.crafted.pixels), include_path=True)
                (model,) = client.models()
            health, _ = pathguard(capsys, monkeypatch, "health", "--target", target)
            _, load = pathguard(
                capsys, monkeypatch, "bench", photos / "digit-0", "--target", target, "--calls", 20, "--json"
            )
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0

    assert code in (0, 3)
    assert health == 0
    assert sum(verdict["label"] == "digit-3" for verdict in verdicts) > len(verdicts) / 2
    assert {verdict["verdict"] for verdict in verdicts} <= {"CLEAN", "ADVERSARIAL"}
    # What is answered over the wire is what was measured offline.
    offline = Detector(Bundle(bundle)).detect(shard.crafted.pixels)
    assert [result.label for result in results] == offline.labels.tolist() == shard.crafted.predicted.tolist()
    np.testing.assert_allclose([result.score for result in results], offline.scores, atol=1e-3)
    np.testing.assert_allclose([result.p_value for result in results], offline.p_values, atol=0.02)
    assert {name: bits.shape for name, bits in results[0].path.items()} == {n: (w,) for n, w in model.layers.items()}
    flagged = [result.verdict is Verdict.ADVERSARIAL for result in results]
    assert flagged == [result.p_value <= model.max_false_alarm_rate for result in results]
    assert json.loads(load)[0]["errors"] == 0
