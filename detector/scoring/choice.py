"""Which features, which classifier, whether attacks are carried on: chosen on the fitting split, by unseen attacks.

Each candidate is fitted on all families of attacks but one, on the images of one half, and judged by the family left
out, on the images of the other half: neither the attack nor the image was seen. Choosing by attacks that were fitted on
would reward what learns those attacks by heart.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from detector.errors import DataError
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.paths.features import FEATURES, features_named
from detector.scoring.classifier import FalseAlarmClassifier
from detector.scoring.classifiers import CLASSIFIERS
from detector.scoring.compiled_score import compile_score
from detector.scoring.evaluation import auroc
from detector.scoring.fitting import fit_classifier
from detector.scoring.overshoot import overshot
from detector.scoring.sample import Sample

log = logging.getLogger(__name__)

# Images of each attack, and clean images, that the choice is made by: enough to tell candidates apart.
ATTACKED_IMAGES, CLEAN_IMAGES = 400, 3000


@dataclass(frozen=True, slots=True)
class Candidate:
    """Features and a classifier on them, and how they did on attacks left out.

    Attributes:
        features: kinds joined by `+`.
        classifier: name in `CLASSIFIERS`.
        overshoot: whether it is fitted on attacks carried on (`detector.scoring.overshoot`) as well.
        worst: the smallest AUROC over the families, each left out in turn.
        mean: their mean.
        seen: mean AUROC over the families when all are fitted on, on images that were not.
    """

    features: str
    classifier: str
    overshoot: bool
    worst: float
    mean: float
    seen: float

    @property
    def merit(self) -> float:
        """What is made large: attacks left out and attacks fitted on count alike; of the former the worst as well."""
        return (self.worst + self.mean) / 4 + self.seen / 2


# Attacks that are variants of another: BIM is PGD without its random start, MI-FGSM with momentum; AutoAttack begins
# with both of APGD's losses.
VARIANTS: Mapping[str, str] = {"bim": "pgd", "mi-fgsm": "pgd", "autoattack": "apgd"}


def family_of(recipe: str) -> str:
    """Recipes of one attack and its variants, whatever their budget: `pgd-2`, `pgd-end` and `bim` are PGD."""
    attack = "mi-fgsm" if recipe.startswith("mi-fgsm") else recipe.partition("-")[0]
    return VARIANTS.get(attack, attack)


def choose(
    clean: Sample,
    attacked: Mapping[str, Sample],
    features: Sequence[str],
    classifiers: Sequence[str],
    seed: int = 0,
    listen: Callable[[Candidate], None] = lambda _: None,
    fewer: bool = True,
    overshoot: Sequence[bool] = (False,),
    benign: Mapping[str, Sample] = MappingProxyType({}),
) -> list[Candidate]:
    """All that was tried, best first.

    Classifiers are compared on all the features, with attacks carried on and without where that is to be chosen; then,
    with the best of them, features: each kind is left out in turn for as long as that helps.

    Args:
        clean: clean images of the fitting split.
        attacked: recipe -> its successful attacks on the fitting split.
        features: kinds to choose from, in `FEATURES`.
        classifiers: names to choose from.
        seed: of classifiers and halves.
        listen: called after every candidate.
        fewer: whether kinds of features may be left out.
        overshoot: whether attacks are carried on to fit on them as well: what to choose from.
        benign: kind -> images that every candidate is to let pass as well, and that none is judged by.

    Raises:
        DataError: there are fewer than two families of attacks, or so few images of them that none can be left out.
    """
    families = sorted({family_of(recipe) for recipe in attacked})
    if len(families) < 2:
        raise DataError(f"expected at least two families of attacks to leave one out, got {', '.join(families)}")
    clean = clean.at(slice(CLEAN_IMAGES))
    attacked = {recipe: sample.at(slice(ATTACKED_IMAGES)) for recipe, sample in attacked.items()}
    folds = _folds(attacked, families, seed)
    short = [family for family in families if not any(left_out == family for _, left_out in folds)]
    if len(short) == len(families) or not any(left_out is None for _, left_out in folds):
        raise DataError("expected attacked images in both halves of the fitting split to choose by, got too few")
    if short:
        log.warning("too few attacked images to choose by leaving out %s", ", ".join(short))
    carried_on = (
        {recipe: overshot(clean, sample, seed) for recipe, sample in attacked.items()} if any(overshoot) else {}
    )
    tried: dict[tuple[str, str, bool], Candidate] = {}

    def attempt(kinds: Sequence[str], classifier: str, further: bool) -> Candidate:
        key = ("+".join(kinds), classifier, further)
        if key not in tried:
            tried[key] = _judged(*key, clean, attacked, carried_on if further else {}, benign, folds, seed)
            listen(tried[key])
        return tried[key]

    pairs = [(name, further) for name in classifiers for further in overshoot]
    best = max((attempt(features, *pair) for pair in pairs), key=lambda candidate: candidate.merit)
    kinds = list(features)
    while fewer and len(kinds) > 1:
        rests = [[kind for kind in kinds if kind != dropped] for dropped in kinds]
        found = max(
            (attempt(rest, best.classifier, best.overshoot) for rest in rests), key=lambda candidate: candidate.merit
        )
        if found.merit < best.merit:
            break
        best, kinds = found, found.features.split("+")
    return sorted(tried.values(), key=lambda candidate: -candidate.merit)


Fold = tuple[int, str | None]


def _folds(attacked: Mapping[str, Sample], families: Sequence[str], seed: int) -> list[Fold]:
    """Half to fit on and family to leave out (None: none), wherever there is something to fit on and to judge by."""
    folds: list[Fold] = []
    for half in (0, 1):
        fitting, judging = (
            {family_of(name) for name, sample in attacked.items() if len(_half(sample, side, seed).ids)}
            for side in (half, 1 - half)
        )
        folds += [(half, family) for family in families if fitting - {family} and family in judging]
        folds += [(half, None)] if fitting and judging else []
    return folds


def _judged(
    features: str, classifier: str, further: bool, clean: Sample, attacked: Mapping[str, Sample],
    carried_on: Mapping[str, Sample], benign: Mapping[str, Sample], folds: Sequence[Fold], seed: int,
) -> Candidate:  # fmt: skip
    unseen: dict[str, list[float]] = {family: [] for _, family in folds if family is not None}
    seen: list[float] = []
    for half in (0, 1):
        fitting, judging = _half(clean, half, seed), _half(clean, 1 - half, seed)
        columns = features_named(features, EvidenceShape.of(clean.evidence)).fit(rows_of(fitting.evidence))
        usual, judged_clean = columns.of(fitting.evidence), columns.of(judging.evidence)
        fitted_on = {name: columns.of(_half(sample, half, seed).evidence) for name, sample in attacked.items()}
        beyond = {name: columns.of(_half(sample, half, seed).evidence) for name, sample in carried_on.items()}
        passing = {name: columns.of(_half(sample, half, seed).evidence) for name, sample in benign.items()}
        judged_by = {name: columns.of(_half(sample, 1 - half, seed).evidence) for name, sample in attacked.items()}
        for left_out in (family for side, family in folds if side == half):
            others = {name: rows for name, rows in fitted_on.items() if family_of(name) != left_out}
            pipeline = fit_classifier(classifier, usual, others, seed, beyond, passing)
            score = compile_score(FalseAlarmClassifier.around(pipeline, 0.05))
            scores = score(judged_clean)
            for name, rows in judged_by.items():
                if len(rows) and left_out is None:
                    seen.append(auroc(scores, score(rows)))
                elif len(rows) and family_of(name) == left_out:
                    unseen[family_of(name)].append(auroc(scores, score(rows)))
    means = [float(np.mean(values)) for values in unseen.values()]
    return Candidate(features, classifier, further, min(means), float(np.mean(means)), float(np.mean(seen)))


def _half(sample: Sample, half: int, seed: int) -> Sample:
    """Images of one half, by their id: a clean image and all that was made of it lie on the same side."""
    side = np.random.default_rng(seed).integers(2, size=int(sample.ids.max(initial=0)) + 1)
    # The generator's first numbers are the same however many are drawn: an id has one side in every sample.
    return sample.at(side[sample.ids] == half)


ALL_KINDS, ALL_CLASSIFIERS = tuple(FEATURES), tuple(CLASSIFIERS)
