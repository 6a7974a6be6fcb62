"""The later stages of a bundle: attacked images, a detector fitted on their paths, and its figures."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from attacks.adaptive.defence import defence_of
from attacks.benign import benign_samples
from attacks.campaign import Campaign, run_attacks
from attacks.evidence import clean_sample, fooling_evidence, fooling_sample
from attacks.fitting_sets import fitting_recipes
from attacks.recipes import Recipe
from attacks.report import AttackFigures, attack_figures
from attacks.store import AttackStore, Origin
from detector.batches import best_device
from detector.bundle import Bundle, DetectorInfo, add_detector
from detector.datasets import Splits
from detector.errors import ArtifactError
from detector.model_card import write_card
from detector.network.decouple import GatedNet
from detector.network.folding import fold_normalisation
from detector.paths.encoder import encode_set
from detector.paths.features import ALL, FEATURES, kinds_named
from detector.scoring.choice import ALL_CLASSIFIERS, ALL_KINDS, Candidate, choose
from detector.scoring.evaluation import auroc
from detector.scoring.fitting import CLASSIFIER, fit_detector
from detector.scoring.overshoot import overshot
from detector.scoring.sample import Sample
from detector.stages import check_fits
from detector.workers import IN_PROCESS, Workers

ATTACKED_SPLITS = ("fitting", "test")
AUTO = "auto"
# Of clean images and of each attack: all of CIFAR-10's fitting split, and a bound on memory for larger sets.
FITTED_IMAGES = 4000


def make_attacks(
    bundle: Bundle, splits: Splits, recipes: Sequence[Recipe], folder: Path, limit: int | None, seed: int,
    shard_images: int, listen: Callable[[Campaign], None], attacked_splits: Sequence[str] = ATTACKED_SPLITS,
    workers: Workers = IN_PROCESS,
) -> list[AttackFigures]:  # fmt: skip
    """Attack the bundle's network; what `folder` already holds is not done again.

    Args:
        bundle: with a decoupled network.
        splits: the data.
        recipes: the attacks.
        folder: of the store.
        limit: at most this many images of each split; None for all.
        seed: of the attacks' random draws.
        shard_images: images in memory at a time.
        listen: called after every shard.
        attacked_splits: names of the splits to attack.
        workers: who attacks; the files are the same for any.

    Returns:
        How each attack did on the last of the splits.

    Raises:
        ArtifactError: `folder` holds attacks on another network, data set or seed, or an attack is to know a detector
            and the bundle has none.
        DataError: the data does not fit, the folder is in use, or the disk is full.
    """
    network = _network_for(bundle, splits).to(workers.device)
    attacked = {name: splits.named(name).first(limit) for name in attacked_splits}
    origin = Origin(bundle.network_digest, splits.train.name, seed, shard_images)
    defence = None
    if any(recipe.knows_detector for recipe in recipes):
        defence = defence_of(bundle, network, splits.validation, seed=seed)
    known = None if defence is None else defence.known
    # Workers need not be where this process is.
    with AttackStore.writing(folder.resolve(), origin) as store:
        backbone = bundle.backbone().to(workers.device)
        # What is attacked is the network as it is served; a gradient costs a quarter less on it.
        run_attacks(fold_normalisation(network), attacked, recipes, store, listen, backbone, defence, known, workers)
        return attack_figures(store, attacked_splits[-1])


def make_detector(
    bundle: Bundle, splits: Splits, store: AttackStore, features: str, rate: float, seed: int,
    classifier: str = CLASSIFIER, fit_on: str = "all", per_class: bool = False,
    listen: Callable[[Candidate], None] = lambda _: None, workers: Workers = IN_PROCESS, overshoot: bool | None = False,
    benign: bool = False,
) -> Bundle:  # fmt: skip
    """Fit a detector on clean images and stored attacks of the fitting split, calibrate it, add it to the bundle.

    Args:
        bundle: with a decoupled network.
        splits: the data.
        store: attacks on that network.
        features: kinds of features, of `detector.paths.features.FEATURES`, joined by `+`, `all`, or `auto` to choose
            by attacks left out.
        rate: share of false alarms allowed unless a request says otherwise, in (0, 1).
        seed: of the classifier.
        classifier: its name, in `detector.scoring.classifiers.CLASSIFIERS`, or `auto` to choose likewise.
        fit_on: which stored attacks to fit on: a set of `attacks.fitting_sets.FITTING_SETS`, or recipes by commas.
        per_class: whether the rate is to hold for each predicted class by itself.
        listen: called after every candidate of the choice.
        workers: who reads and encodes the images; the classifier is fitted here.
        overshoot: whether the attacks are carried on (`detector.scoring.overshoot`) to fit on that too; None to choose.
        benign: whether noise and corruptions (`attacks.benign`) are fitted on too, as what is to pass.

    Raises:
        ArtifactError: the attacks are on another network.
        DataError: the data does not fit, or no attack succeeded.
        RequestError: there is no threshold for the rate, or the features are unknown.
    """
    network = _network_for(bundle, splits, store).to(workers.device)
    clean, attacked = fitting_samples(network, splits, store, fit_on, workers)
    others = benign_samples(network, splits.fitting, seed, workers) if benign else {}
    tried: list[Candidate] = []
    if AUTO in (features, classifier) or overshoot is None:
        kinds = ALL_KINDS if features == AUTO else kinds_named(features)
        classifiers = ALL_CLASSIFIERS if classifier == AUTO else (classifier,)
        further = (False, True) if overshoot is None else (overshoot,)
        tried = choose(clean, attacked, kinds, classifiers, seed, listen, features == AUTO, further, others)
        features, classifier, overshoot = tried[0].features, tried[0].classifier, tried[0].overshoot
    beyond = {name: overshot(clean, sample, seed).evidence for name, sample in attacked.items()} if overshoot else {}
    fitted = fit_detector(
        features, clean.evidence, {name: sample.evidence for name, sample in attacked.items()},
        encode_set(network, splits.calibration, workers=workers), rate, seed, classifier, per_class, beyond,
        {name: sample.evidence for name, sample in others.items()},
    )  # fmt: skip
    training: dict[str, object] = {
        "seed": seed,
        "classifier": classifier,
        "fit_on": fit_on,
        "overshoot": bool(overshoot),
        "benign_images": {kind: len(sample.ids) for kind, sample in others.items()},
        "per_class": per_class,
        "candidates": [asdict(candidate) for candidate in tried],
        "clean_images": len(clean.ids),
        "attacked_images": {recipe: len(sample.ids) for recipe, sample in attacked.items()},
        "calibration_images": len(fitted.calibration),
        "attack_seed": store.origin.seed,
    }
    info = DetectorInfo("+".join(fitted.features.kinds), rate, tuple(attacked), classifier, bool(overshoot), benign)
    learnt = fitted.features.arrays()
    grown = add_detector(bundle, info, fitted.classifier.estimator_, fitted.calibration, training, learnt)
    write_card(grown)
    return grown


def auroc_by_features(
    bundle: Bundle, splits: Splits, fit_on: AttackStore, judge_by: AttackStore, seed: int
) -> dict[str, dict[str, float]]:
    """Features -> attack -> AUROC on the test split of a fresh classifier on each kind of features alone, and on all.

    Args:
        bundle: with a decoupled network.
        splits: the data.
        fit_on: attacks on the fitting split.
        judge_by: attacks on the test split; may be the same store.
        seed: of the classifiers.

    Raises:
        ArtifactError: the attacks are on another network.
        DataError: the data does not fit, attacks are unfinished, or none succeeded to fit on.
    """
    network = _network_for(bundle, splits, fit_on)
    _check_attacks(bundle, judge_by)
    judge_by.check_finished("test")
    clean, samples = fitting_samples(network, splits, fit_on)
    attacked = {name: sample.evidence for name, sample in samples.items()}
    calibration, test = (list(encode_set(network, part)) for part in (splits.calibration, splits.test))
    seen = {name: list(fooling_evidence(network, judge_by, "test", name)) for name in judge_by.attacks("test")}
    found: dict[str, dict[str, float]] = {}
    for kind in (*FEATURES, ALL):
        fitted = fit_detector(kind, clean.evidence, attacked, calibration, seed=seed)
        usual = fitted.scores(test)
        found[kind] = {name: auroc(usual, fitted.scores(parts)) for name, parts in seen.items() if parts}
    return found


def fitting_samples(
    network: GatedNet, splits: Splits, store: AttackStore, fit_on: str = "all", workers: Workers = IN_PROCESS
) -> tuple[Sample, dict[str, Sample]]:
    """Clean images and successful attacks of the fitting split, `FITTED_IMAGES` of each at most.

    Args:
        network: the bundle's.
        splits: the data.
        store: attacks on that network.
        fit_on: a set of `attacks.fitting_sets.FITTING_SETS`, or recipes by commas.
        workers: who reads and encodes them.

    Raises:
        DataError: the attacks are unfinished, or there are no clean images.
        RequestError: the store has no such attacks.
    """
    store.check_finished("fitting")
    clean = clean_sample(network, splits.fitting, FITTED_IMAGES, workers)
    found = {
        recipe: fooling_sample(network, store, "fitting", recipe, FITTED_IMAGES, workers)
        for recipe in fitting_recipes(store, fit_on)
    }
    return clean, {recipe: sample for recipe, sample in found.items() if sample is not None}


def _network_for(bundle: Bundle, splits: Splits, store: AttackStore | None = None) -> GatedNet:
    """The bundle's network on the best device, once data and attacks are known to belong to it."""
    check_fits(bundle, splits.test)
    if store is not None:
        _check_attacks(bundle, store)
    return bundle.network().to(best_device())


def _check_attacks(bundle: Bundle, store: AttackStore) -> None:
    if store.origin.network != bundle.network_digest:
        raise ArtifactError(
            f"expected attacks on the network {bundle.network_digest[:12]} of {bundle.folder}, got attacks on "
            f"{store.origin.network[:12]} in {store.folder}"
        )
