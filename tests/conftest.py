"""Fixed seeds and one torch thread in every test; small real images (scikit-learn's digits) for the chain."""

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from sklearn.datasets import load_digits

from detector.bundle import Bundle, DetectorInfo, GatesInfo, NetworkInfo, add_detector, add_network, begin_bundle
from detector.datasets import ImageSet, Splits, cut
from detector.images import ImageSpec
from detector.interpretation.survey import make_usual_paths
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.paths.encoder import Evidence, encode_set
from detector.scoring.fitting import fit_detector

# How long an example takes says nothing on a busy machine.
settings.register_profile("pathguard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pathguard")


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    # A command that ran in this process leaves its own log behind, which writes to what pytest has closed since.
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]


def in_a_process_of_its_own(function: Callable[..., None], *texts: object) -> int:
    """Call a function of a module of tests in a fresh Python, and give its exit code, negative for a signal.

    A fork of this process would take over locks that other threads hold, of gRPC's for one, and wait for them forever.
    """
    code = (
        "import importlib, sys, torch; torch.set_num_threads(1); "
        "getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*sys.argv[3:])"
    )
    called = [function.__module__, function.__qualname__, *map(str, texts)]
    return subprocess.run([sys.executable, "-c", code, *called], cwd=Path(__file__).parent.parent).returncode


@pytest.fixture(scope="session")
def digits() -> Splits:
    """As `digit_splits`."""
    return digit_splits()


def digit_splits() -> Splits:
    """1,797 real photos of handwritten digits, 8 x 8 grey, cut like every other set."""
    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = source.target.astype(np.int64)
    classes = tuple(str(digit) for digit in range(10))

    def part(positions: slice) -> ImageSet:
        own = pixels[positions]
        return ImageSet(
            "digits",
            labels[positions],
            np.arange(len(own)),
            classes,
            ImageSpec(8, 8, 1),
            "digits",
            lambda ids: own[ids],
        )

    return cut(part(slice(0, 1400)), part(slice(1400, None)))


@pytest.fixture
def decoupled_bundle(tmp_path: Path, digits: Splits) -> Bundle:
    """A bundle with an untrained backbone and an untrained decoupled network for digits."""
    return untrained_bundle(digits)(tmp_path / "bundle")


@pytest.fixture
def fitted_bundle(decoupled_bundle: Bundle, digits: Splits) -> Bundle:
    """The same with a linear detector of random pixels, calibrated on clean images."""
    network, draws = decoupled_bundle.network(), np.random.default_rng(0)
    noise = replace(
        digits.fitting.subset(slice(0, 80)),
        read=lambda ids: draws.integers(0, 256, (len(ids), 8, 8, 1)).astype(np.uint8),
    )
    clean, noisy = (Evidence.stacked(encode_set(network, images)) for images in (digits.fitting, noise))
    assert clean is not None
    assert noisy is not None
    features = "bits+gates+margins"
    made = fit_detector(features, clean, {"noise": noisy}, encode_set(network, digits.calibration))
    info = DetectorInfo(features, 0.05, ("noise",))
    return add_detector(decoupled_bundle, info, made.classifier.estimator_, made.calibration, {})


@pytest.fixture
def explained_bundle(fitted_bundle: Bundle, digits: Splits) -> Bundle:
    """The same with statistics of paths."""
    return make_usual_paths(fitted_bundle, digits)


def untrained_bundle(digits: Splits) -> Callable[[Path], Bundle]:
    def make(folder: Path) -> Bundle:
        backbone = build_network("resnet8", 1, 10)
        info = NetworkInfo("resnet8", digits.train.class_names, digits.train.spec, "digits", "digits")
        bundle = begin_bundle(folder, info, backbone, {"figures": {}})
        return add_network(bundle, folder, GatesInfo(0.7, True, "pathguard"), decouple(backbone), {"figures": {}})

    return make
