"""A folder that grows by stages: backbone, decoupled network, detector.

Weights are safetensors, the scikit-learn pipeline is skops with an explicit list of types, the rest is JSON. Nothing
is loaded before every part has the SHA-256 that the manifest states, and nothing is unpickled, ever.

    DIR/manifest.json                 schema, stages, versions, data, seeds, SHA-256 and size of every part, and its own
                                      SHA-256
    DIR/backbone-1a2b3c4d.safetensors stage 1
    DIR/network-....safetensors       stage 2: the decoupled network, gates included
    DIR/classifier-....skops          stage 3: scikit-learn pipeline on features of the path
    DIR/features-....safetensors      what the features learnt of clean paths; only where they learn anything
    DIR/calibration-....safetensors   scores of clean calibration images
    DIR/statistics-....safetensors    of clean paths, kept with the network where `pathguard interpret` was run

A part's file is named after its content, so that a stage that is made anew writes new files, and the manifest, swapped
last, names either the old ones or the new ones. The digests find damage; they are no signature: who can write the
folder can write them too.

A manifest of an older schema is read as if it had been upgraded; `upgrade_bundle` writes it so. A newer one is refused.
"""

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError
from sklearn.base import BaseEstimator
from torch import nn

from detector.errors import ArtifactError, RequestError
from detector.files import write_whole
from detector.images import ImageSpec
from detector.interpretation.usual_paths import UsualPaths
from detector.network.decouple import GatedNet, decouple, decouple_named
from detector.network.networks import build_network
from detector.paths.evidence_shape import EvidenceShape
from detector.paths.features import PathFeatures, kinds_named, learns
from detector.scoring.classifier import FalseAlarmClassifier
from detector.scoring.saved_estimator import load_estimator, save_estimator
from detector.scoring.thresholds import Calibration

SCHEMA = 3
MANIFEST = "manifest.json"
BACKBONE, NETWORK, CLASSIFIER, CALIBRATION = "backbone", "network", "classifier", "calibration"
LEARNT, STATISTICS, COMPACTION = "features", "statistics", "compaction"
SUFFIXES = {
    BACKBONE: ".safetensors", NETWORK: ".safetensors", CLASSIFIER: ".skops", LEARNT: ".safetensors",
    CALIBRATION: ".safetensors", STATISTICS: ".safetensors", COMPACTION: ".safetensors",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """What it takes to rebuild the networks of a bundle.

    Attributes:
        name: of the backbone, in `detector.network.networks.NETWORKS`, or the `package.module:function` that builds it.
        classes: names of the classes, in the order of their index.
        spec: the images that it takes.
        data: name of the data set that it was trained on.
        data_digest: of that set (`ImageSet.digest`).
    """

    name: str
    classes: tuple[str, ...]
    spec: ImageSpec
    data: str
    data_digest: str


@dataclass(frozen=True, slots=True)
class GatesInfo:
    """How the backbone was decoupled.

    Attributes:
        keep: share of filters that was asked to stay open, in (0, 1].
        normalised: whether gate logits are batch-normalised.
        objective: name of the training objective.
        patterns: names of the gated convolutions, with `*` and `?`; none for all that can be gated.
        named: for a network that torch.fx cannot trace, name of each gated convolution -> name of the normalisation
            behind it.
    """

    keep: float
    normalised: bool
    objective: str
    patterns: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DetectorInfo:
    """How the detector was fitted.

    Attributes:
        features: kinds of features that it reads, of `detector.paths.features.FEATURES`, joined by `+`.
        max_false_alarm_rate: the rate at which it flags unless asked otherwise, in (0, 1).
        recipes: names of the attacks that it was fitted on.
        classifier: name of the classifier, in `detector.scoring.classifiers.CLASSIFIERS`; empty for another.
        overshoot: whether it was fitted on these attacks carried on (`detector.scoring.overshoot`) as well.
        benign: whether it was fitted on noise and corruptions too, as on images that are to pass.
    """

    features: str
    max_false_alarm_rate: float
    recipes: tuple[str, ...]
    classifier: str = ""
    overshoot: bool = False
    benign: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        network: the backbone and its images.
        gates: None before the network is decoupled.
        detector: None before a detector is fitted.
        parts: name of a part -> its SHA-256.
        training: stage -> command line, seed, figures and other facts about how it was made.
        sizes: name of a part -> its bytes, looked at before it is read.
        versions: of Python and of the libraries that wrote it.
        schema: version of this layout.
    """

    network: NetworkInfo
    gates: GatesInfo | None = None
    detector: DetectorInfo | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    training: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


class Bundle:
    """A verified bundle; its parts are read when they are asked for."""

    def __init__(self, folder: Path, trusted: str | None = None) -> None:
        """Open a bundle and verify every part.

        Args:
            folder: where it lies.
            trusted: the `package.module:function` whose code may be run to build the network, where it is a user's own.

        Raises:
            ArtifactError: the manifest is missing, damaged or newer, or a part is missing or altered.
        """
        self.folder = folder
        self.trusted = trusted
        path = folder / MANIFEST
        if not path.is_file():
            raise ArtifactError(f"expected a bundle in {folder}, got no {MANIFEST}; `pathguard train` begins one")
        self.manifest, self.digest = _manifest_from(path.read_bytes(), path)
        # What was verified is what is used: the bytes are read once and kept until asked for.
        self._contents = {
            name: self._verified(name, digest, self.manifest.sizes[name])
            for name, digest in self.manifest.parts.items()
        }

    def backbone(self) -> nn.Module:
        """The plain network, in evaluation mode.

        Raises:
            ArtifactError: its weights do not fit the network that the manifest names.
            RequestError: it is built by a user's own code, and that is not trusted or fails.
        """
        self._check_backbone()
        return self._with_weights(self._fresh_backbone(), BACKBONE)

    def network(self) -> GatedNet:
        """The decoupled network, in evaluation mode.

        Raises:
            ArtifactError: the bundle has none yet, or its weights do not fit.
            RequestError: it is built by a user's own code, and that is not trusted or fails.
        """
        gates = self.manifest.gates
        if gates is None:
            raise ArtifactError(
                f"expected a decoupled network in {self.folder}, got a backbone; run `pathguard decouple`"
            )
        if gates.named:
            network = decouple_named(self._fresh_backbone(), gates.keep, gates.normalised, gates.named)
        else:
            network = decouple(self._fresh_backbone(), gates.keep, gates.normalised, gates.patterns)
        self._with_weights(network, NETWORK)
        return network

    def classifier(self) -> FalseAlarmClassifier:
        """The scikit-learn classifier on features of the path, calibrated; True stands for adversarial.

        Raises:
            ArtifactError: the bundle has none yet, or it holds types that are not trusted.
        """
        info = self.detector_info()
        estimator = load_estimator(self._contents[CLASSIFIER])
        try:
            return FalseAlarmClassifier.of_fitted(estimator, self.calibration(), info.max_false_alarm_rate)
        except RequestError as error:
            raise ArtifactError(f"{self.folder}: {error}") from None

    def features(self, network: GatedNet) -> PathFeatures:
        """What the classifier reads, fitted: evidence -> named columns.

        Args:
            network: the bundle's.

        Raises:
            ArtifactError: the bundle has no detector yet, or its features are of another network.
        """
        try:
            kinds = kinds_named(self.detector_info().features)
        except RequestError as error:
            raise ArtifactError(f"{self.folder}: {error}") from None
        features = PathFeatures(kinds, EvidenceShape(len(self.manifest.network.classes), network.layers, network.reads))
        content = self._contents.get(LEARNT)
        return features.with_arrays({} if content is None else safetensors.numpy.load(content))

    def calibration(self) -> Calibration:
        """The calibration scores.

        Raises:
            ArtifactError: the bundle has none yet.
        """
        self.detector_info()
        arrays = safetensors.numpy.load(self._contents[CALIBRATION])
        return Calibration(arrays["scores"], arrays.get("labels"))

    @property
    def has_usual_paths(self) -> bool:
        """Whether statistics of paths are there."""
        return STATISTICS in self.manifest.parts

    def usual_paths(self) -> UsualPaths:
        """Statistics of the paths of clean images.

        Raises:
            ArtifactError: the bundle has none, or they are damaged.
        """
        if not self.has_usual_paths:
            raise ArtifactError(
                f"expected statistics of paths in {self.folder}, got none; run `pathguard interpret --bundle "
                f"{self.folder}`"
            )
        return UsualPaths.from_bytes(
            self._contents[STATISTICS], self.network().layers, len(self.manifest.network.classes)
        )

    @property
    def network_digest(self) -> str:
        """SHA-256 of the decoupled network's weights: what attacks and paths belong to.

        Raises:
            ArtifactError: the bundle has no decoupled network yet.
        """
        if NETWORK not in self.manifest.parts:
            raise ArtifactError(
                f"expected a decoupled network in {self.folder}, got a backbone; run `pathguard decouple`"
            )
        return self.manifest.parts[NETWORK]

    @property
    def backbone_digest(self) -> str:
        """SHA-256 of the backbone's weights.

        Raises:
            ArtifactError: the bundle is a compacted one, without its backbone.
        """
        self._check_backbone()
        return self.manifest.parts[BACKBONE]

    def never_open(self) -> npt.NDArray[np.bool_] | None:
        """The filters that a compacted bundle is served without, `(total channels,)`; None of another bundle.

        Raises:
            ArtifactError: they are not as many as the network has.
        """
        if COMPACTION not in self.manifest.parts:
            return None
        found = safetensors.numpy.load(self._contents[COMPACTION])["never_open"].astype(np.bool_)
        filters = sum(self.network().layers.values())
        if found.shape != (filters,):
            raise ArtifactError(f"expected a mark for each of {filters} filters in {COMPACTION}, got {found.shape}")
        return found

    @property
    def model_digest(self) -> str:
        """SHA-256 of all that labels, scores and paths depend on; the calibration and the rate are no part of it.

        Raises:
            ArtifactError: the bundle has no detector yet.
        """
        raw, info = asdict(self.manifest), self.detector_info()
        parts = self.manifest.parts
        names = {name: parts[name] for name in (NETWORK, CLASSIFIER, LEARNT) if name in parts}
        # As they were called up to schema 2: a bundle's version outlives its upgrade.
        features = "all" if info.features == _ONCE_ALL else info.features
        return _digest_of({"network": raw["network"], "gates": raw["gates"], "features": features, "parts": names})

    @property
    def threshold_digest(self) -> str:
        """SHA-256 of the calibration scores.

        Raises:
            ArtifactError: the bundle has no detector yet.
        """
        self.detector_info()
        return self.manifest.parts[CALIBRATION]

    def detector_info(self) -> DetectorInfo:
        """How the detector was fitted.

        Raises:
            ArtifactError: the bundle has none yet.
        """
        if self.manifest.detector is None:
            raise ArtifactError(f"expected a detector in {self.folder}, got a network without one; run `pathguard fit`")
        return self.manifest.detector

    def _check_backbone(self) -> None:
        if BACKBONE not in self.manifest.parts:
            raise ArtifactError(
                f"expected a bundle with its backbone in {self.folder}, got a compacted one, which is for serving only"
            )

    def _fresh_backbone(self) -> nn.Module:
        info = self.manifest.network
        return build_network(info.name, info.spec.channels, len(info.classes), self.trusted)

    def _verified(self, part: str, expected: str, size: int) -> bytes:
        path = self.folder / _file_of(part, expected)
        if not path.is_file():
            raise ArtifactError(f"expected the part {path.name} in {self.folder}, got no such file")
        if path.stat().st_size != size:
            raise ArtifactError(f"expected {path} of {size} bytes, got {path.stat().st_size}: it was altered")
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise ArtifactError(f"expected {path} with SHA-256 {expected[:12]}..., got {found[:12]}...: it was altered")
        return content

    def _with_weights(self, network: nn.Module, part: str) -> nn.Module:
        try:
            network.load_state_dict(safetensors.torch.load(self._contents[part]))
        except (RuntimeError, SafetensorError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"expected weights of {self.manifest.network.name} in {part}, got: {reason}") from None
        return network.eval()


def begin_bundle(folder: Path, info: NetworkInfo, backbone: nn.Module, training: Mapping[str, object]) -> Bundle:
    """Write a new bundle with its first stage, the backbone.

    Args:
        folder: where; made if missing.
        info: what it takes to rebuild the backbone.
        backbone: the trained network.
        training: how it was made, JSON values.
    """
    return _grow(folder, Manifest(info), "backbone", training, {BACKBONE: _weights(backbone)}, info.name, None)


def add_network(
    bundle: Bundle, folder: Path, gates: GatesInfo, network: GatedNet, training: Mapping[str, object]
) -> Bundle:
    """The second stage: `bundle` with a decoupled network, written to `folder` (its own or another).

    A detector that was fitted on an earlier network is left out: its paths mean nothing to the new one.

    Raises:
        ArtifactError: `bundle` is a compacted one, without its backbone, or the folder cannot be written.
    """
    manifest = replace(
        bundle.manifest,
        gates=gates,
        detector=None,
        parts={BACKBONE: bundle.backbone_digest},
        training={"backbone": bundle.manifest.training["backbone"]},
    )
    parts = {NETWORK: _weights(network)}
    if folder != bundle.folder:
        parts[BACKBONE] = bundle._contents[BACKBONE]
    before = bundle if folder == bundle.folder else None
    return _grow(folder, manifest, "network", training, parts, bundle.trusted, before)


def add_detector(
    bundle: Bundle,
    info: DetectorInfo,
    classifier: BaseEstimator,
    calibration: Calibration,
    training: Mapping[str, object],
    learnt: Mapping[str, npt.NDArray[np.float32]] = MappingProxyType({}),
) -> Bundle:
    """The third stage: the bundle, in its own folder, with a fitted and calibrated detector.

    Args:
        bundle: with a decoupled network.
        info: how the detector was fitted.
        classifier: reads the columns of the features that `info` names.
        calibration: scores of clean images.
        training: how it was made, JSON values.
        learnt: what those features learnt (`PathFeatures.arrays`).

    Raises:
        ArtifactError: the classifier holds types that could not be loaded again.
    """
    parts = {part: digest for part, digest in bundle.manifest.parts.items() if part != LEARNT}
    before = {stage: made for stage, made in bundle.manifest.training.items() if stage != CALIBRATION}
    manifest = replace(bundle.manifest, detector=info, parts=parts, training=before)
    contents = {CLASSIFIER: save_estimator(classifier), CALIBRATION: _scores(calibration)}
    if learnt:
        contents[LEARNT] = safetensors.numpy.save({name: np.ascontiguousarray(part) for name, part in learnt.items()})
    return _grow(bundle.folder, manifest, "detector", training, contents, bundle.trusted, bundle)


def add_usual_paths(bundle: Bundle, usual: UsualPaths, made: Mapping[str, object]) -> Bundle:
    """The bundle, in its own folder, with statistics of the paths of clean images; a detector in it stays."""
    contents = {STATISTICS: usual.to_bytes()}
    return _grow(bundle.folder, bundle.manifest, STATISTICS, made, contents, bundle.trusted, bundle)


def check_compacts_into(bundle: Bundle, folder: Path) -> None:
    """Refuse a bundle that cannot be compacted, or a folder that holds more than an earlier compaction of it.

    Raises:
        ArtifactError: the bundle has no detector yet, or the folder holds another bundle.
        RequestError: the folder is the bundle's own.
    """
    bundle.detector_info()
    if folder.resolve() == bundle.folder.resolve():
        raise RequestError(f"expected another folder than {bundle.folder}, whose backbone would be lost, got the same")
    if not (folder / MANIFEST).exists():
        return
    there = Bundle(folder)
    if COMPACTION not in there.manifest.parts or there.network_digest != bundle.network_digest:
        raise ArtifactError(
            f"expected a new folder or one with an earlier compaction of {bundle.folder}, got {folder} with another "
            "bundle; give another --out"
        )


def add_compaction(
    bundle: Bundle, folder: Path, never_open: npt.NDArray[np.bool_], training: Mapping[str, object]
) -> Bundle:
    """A bundle for serving alone: that of another folder without its backbone, and with the filters that never open.

    Args:
        bundle: with a detector.
        folder: where; made if missing.
        never_open: of each filter, `(total channels,)`.
        training: on which images that was seen, JSON values.

    Raises:
        ArtifactError: see `check_compacts_into`; or the folder cannot be written.
        RequestError: the folder is the bundle's own.
    """
    check_compacts_into(bundle, folder)
    parts = {part: digest for part, digest in bundle.manifest.parts.items() if part != BACKBONE}
    contents = {part: bundle._contents[part] for part in parts}
    contents[COMPACTION] = safetensors.numpy.save({"never_open": never_open.astype(np.uint8)})
    manifest = replace(bundle.manifest, parts=parts)
    return _grow(folder, manifest, "compaction", training, contents, bundle.trusted, None)


def recalibrate(
    bundle: Bundle, calibration: Calibration, max_false_alarm_rate: float, training: Mapping[str, object]
) -> Bundle:
    """The bundle, in its own folder, with other calibration scores and another rate; network and classifier stay.

    Raises:
        ArtifactError: the bundle has no detector yet, or the calibration has no threshold for that rate.
    """
    info = replace(bundle.detector_info(), max_false_alarm_rate=max_false_alarm_rate)
    try:
        calibration.check_rate(max_false_alarm_rate)
    except RequestError as error:
        raise ArtifactError(f"{bundle.folder}: {error}") from None
    # What the fit told of its own calibration is no longer so.
    fitted = {
        fact: value for fact, value in bundle.manifest.training.get("detector", {}).items()
        if fact not in ("calibration_images", "per_class")
    }  # fmt: skip
    manifest = replace(bundle.manifest, detector=info, training={**bundle.manifest.training, "detector": fitted})
    contents = {CALIBRATION: _scores(calibration)}
    return _grow(bundle.folder, manifest, CALIBRATION, training, contents, bundle.trusted, bundle)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within it no other command writes the bundle in `folder`, which is made if missing; it takes a moment each time.

    The folder itself is locked, so that no file for that lies in a bundle; a file system that cannot is trusted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _grow(
    folder: Path,
    manifest: Manifest,
    stage: str,
    training: Mapping[str, object],
    contents: Mapping[str, bytes],
    trusted: str | None,
    before: Bundle | None,
) -> Bundle:
    """Write the parts, then the manifest that names them, then remove parts that no manifest names any more.

    Where it grows in place, `before` is what it grows from: another command may have changed the folder meanwhile.
    """
    digests = {part: hashlib.sha256(content).hexdigest() for part, content in contents.items()}
    parts = {**manifest.parts, **digests}
    sizes = {**manifest.sizes, **{part: len(content) for part, content in contents.items()}}
    grown = replace(
        manifest,
        parts=parts,
        sizes={part: sizes[part] for part in parts},
        training={**manifest.training, stage: training},
        versions=_versions(),
        schema=SCHEMA,
    )
    try:
        with _alone(folder):
            path = folder / MANIFEST
            if before is not None and _manifest_from(path.read_bytes(), path)[1] != before.digest:
                raise ArtifactError(f"expected {folder} as it was read, got it changed since; run this again")
            for part, content in contents.items():
                write_whole(folder / _file_of(part, digests[part]), content)
            write_whole(path, _manifest_content(grown))
            kept = {_file_of(part, digest) for part, digest in grown.parts.items()}
            for part, suffix in SUFFIXES.items():
                for file in folder.glob(f"{part}-????????{suffix}"):
                    if file.name not in kept:
                        file.unlink()
            for file in folder.glob("*.partial"):  # of a run that was killed
                file.unlink()
    except OSError as error:
        raise ArtifactError(f"expected to write the bundle {folder}, got: {error.strerror}") from None
    return Bundle(folder, trusted)


def upgrade_bundle(folder: Path) -> tuple[int, int]:
    """Write a bundle's manifest in the present schema; what it was stays beside it as `manifest.schema-N.json`.

    Parts, and with them labels, scores and versions, stay as they are.

    Returns:
        The schema before and after; the same where there is nothing to do.

    Raises:
        ArtifactError: the bundle is damaged or newer, or cannot be written.
    """
    bundle = Bundle(folder)  # every part is verified before anything is written
    content = (folder / MANIFEST).read_bytes()
    before = int(json.loads(content)["schema"])
    if before == SCHEMA:
        return before, before
    try:
        write_whole(folder / f"manifest.schema-{before}.json", content)
        write_whole(folder / MANIFEST, _manifest_content(bundle.manifest))
    except OSError as error:
        raise ArtifactError(f"expected to write the bundle {folder}, got: {error.strerror}") from None
    return before, Bundle(folder).manifest.schema


def _with_sizes(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Schema 1 -> 2: the sizes of the parts, as they lie there; their digests are checked when they are read."""
    files = {part: folder / _file_of(part, digest) for part, digest in raw["parts"].items() if part in SUFFIXES}
    return {**raw, "sizes": {part: file.stat().st_size if file.is_file() else 0 for part, file in files.items()}}


def _with_feature_names(raw: dict[str, Any], _folder: Path) -> dict[str, Any]:
    """Schema 2 -> 3: `all` were these three kinds of features, none of which learns anything."""
    if not raw["detector"] or raw["detector"]["features"] != "all":
        return raw
    return {**raw, "detector": {**raw["detector"], "features": _ONCE_ALL}}


_ONCE_ALL = "bits+gates+margins"

# Schema -> what makes a manifest's values those of the next schema.
_UPGRADES: Mapping[int, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    1: _with_sizes,
    2: _with_feature_names,
}


def _manifest_content(manifest: Manifest) -> bytes:
    raw = asdict(manifest)
    return json.dumps({**raw, "digest": _digest_of(raw)}, indent=2, sort_keys=True).encode()


def _file_of(part: str, digest: str) -> str:
    return f"{part}-{digest[:8]}{SUFFIXES[part]}"


def _digest_of(raw: Mapping[str, object]) -> str:
    """Of a manifest's values, its own digest left out."""
    values = {name: value for name, value in raw.items() if name != "digest"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _weights(network: nn.Module) -> bytes:
    return safetensors.torch.save(
        {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}
    )


def _scores(calibration: Calibration) -> bytes:
    arrays: dict[str, npt.NDArray[Any]] = {"scores": np.ascontiguousarray(calibration.scores)}
    if calibration.labels is not None:
        arrays["labels"] = np.ascontiguousarray(calibration.labels)
    return safetensors.numpy.save(arrays)


def _versions() -> dict[str, str]:
    libraries = ("torch", "scikit-learn", "skops", "safetensors", "numpy")
    return {"python": platform.python_version(), **{library: version(library) for library in libraries}}


def _manifest_from(content: bytes, path: Path) -> tuple[Manifest, str]:
    """The manifest and its digest, checked as far as can be without the parts."""
    try:
        raw: dict[str, Any] = json.loads(content)
        schema = raw["schema"]
        if schema not in {*_UPGRADES, SCHEMA}:
            raise ArtifactError(
                f"expected a bundle of schema 1 to {SCHEMA}, got schema {schema} in {path}; update pathguard"
            )
        digest = _digest_of(raw)
        if raw["digest"] != digest:
            raise ArtifactError(f"expected {path} as it was written, got another digest: it was altered")
        for older in range(schema, SCHEMA):
            raw = _UPGRADES[older](raw, path.parent)
        network, gates, detector = raw["network"], raw["gates"], raw["detector"]
        stages = {BACKBONE: True, NETWORK: gates, CLASSIFIER: detector, CALIBRATION: detector}
        wanted = {part for part, there in stages.items() if there}
        if detector and learns(kinds_named(detector["features"])):
            wanted.add(LEARNT)
        if gates and STATISTICS in raw["parts"]:
            wanted.add(STATISTICS)
        if detector and COMPACTION in raw["parts"]:
            wanted = (wanted - {BACKBONE}) | {COMPACTION}
        if set(raw["parts"]) != wanted or set(raw["sizes"]) != wanted:
            raise ArtifactError(f"expected the parts {sorted(wanted)} in {path}, got {sorted(raw['parts'])}")
        manifest = Manifest(
            network=NetworkInfo(
                network["name"],
                tuple(network["classes"]),
                ImageSpec(**network["spec"]),
                network["data"],
                network["data_digest"],
            ),
            gates=GatesInfo(**{**gates, "patterns": tuple(gates.get("patterns", ()))}) if gates else None,
            detector=DetectorInfo(**{**detector, "recipes": tuple(detector["recipes"])}) if detector else None,
            parts=raw["parts"],
            sizes=raw["sizes"],
            training=raw["training"],
            versions=raw["versions"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RequestError) as error:
        raise ArtifactError(f"expected a bundle's manifest in {path}, got a damaged one ({error!r})") from None
    return manifest, digest
