"""All tables of an evaluation, from what was seen of the images.

Whatever is fitted anew (for a table of features, of attacks left out, of baselines) is fitted on the fitting split of
the same images and attacks as the bundle's detector, or on as many as it is given where each takes it long, and looks
at the test split in its table alone. It is judged by AUROC, which needs no threshold and so no calibration.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_curve

from attacks.corruptions import CORRUPTIONS
from attacks.evaluation.material import CALIBRATION, CLEAN, FITTING, TEST, Material, SetKey, limit_of
from attacks.evaluation.paths import SEES
from attacks.evaluation.protocol import Protocol
from detector.baselines.baseline import Baseline, Observed
from detector.errors import DataError
from detector.scoring.choice import family_of
from detector.scoring.compiled_score import Score
from detector.scoring.evaluation import auroc, bootstrap_interval
from detector.scoring.thresholds import Calibration, Scores, clopper_pearson

log = logging.getLogger(__name__)

RATES = (0.05, 0.01)
Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table.

    Attributes:
        name: file name of its CSV.
        title: what it shows, for a person.
        rows: column -> value; all rows with the columns of the first.
    """

    name: str
    title: str
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Curve:
    """One ROC curve.

    Attributes:
        attack: whose images are told from clean ones.
        auroc: the area below it.
        false_alarms: share of clean images flagged, ascending, `(points,)`.
        detected: share of attacked images flagged, `(points,)`.
    """

    attack: str
    auroc: float
    false_alarms: npt.NDArray[np.float64]
    detected: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Matrix:
    """AUROC of detectors that were fitted on one attack each, on every attack.

    Attributes:
        fitted_on: names of the rows.
        judged_by: names of the columns.
        auroc: `(rows, columns)`; NaN where there are no images.
    """

    fitted_on: Sequence[str]
    judged_by: Sequence[str]
    auroc: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Served:
    """The bundle's detector, as it is.

    Attributes:
        score: rows of class and gate logits -> scores.
        calibration: of the bundle.
        recipes: the attacks that it was fitted on.
        name: its features and classifier, for a person.
    """

    score: Score
    calibration: Calibration
    recipes: Sequence[str]
    name: str


class Judge:
    """Makes tables of what was seen."""

    def __init__(self, material: Material, protocol: Protocol, served: Served, seed: int) -> None:
        """A judge of the detector `served`.

        Raises:
            DataError: no attack fooled the network on the test split, or none of those that the detector was fitted on
                is stored.
        """
        self._material = material
        self._protocol = protocol
        self._served = served
        self._seed = seed
        self._fitted_on = [r for r in served.recipes if material.of(SEES, SetKey(FITTING, r)) is not None]
        if not material.attacks:
            raise DataError("expected at least one attack that fooled the network on the test split, got none")
        if not self._fitted_on:
            raise DataError(f"expected stored attacks of {', '.join(served.recipes)} to fit on, got none")
        self._scores: dict[SetKey, Scores] = {}

    @property
    def attacks(self) -> Sequence[str]:
        """The attacks of the tables."""
        return self._material.attacks

    def attack_sheet(self) -> Sheet:
        """One row an attack: how well its successes are told from clean images."""
        clean, calibration = self._of(TEST, CLEAN), self._served.calibration
        rows = []
        for name in self.attacks:
            found = self._of(TEST, name)
            low, high = bootstrap_interval(clean, found, self._seed, self._protocol.bootstrap)
            row: dict[str, object] = {
                "attack": name, "norm": self._material.norms[name], "fitted on": name in self._served.recipes,
                "images": len(found), "given": self._material.images[name], "fooled": self._material.fooled[name],
                "AUROC": auroc(clean, found), "low": low, "high": high,
            }  # fmt: skip
            for rate in RATES:
                row |= self._detected(found, SetKey(TEST, name), rate, calibration)
            noise = self._known(SetKey(TEST, f"noise-{name}"))
            row["against noise"] = None if noise is None else auroc(noise, found)
            rows.append(row)
        return Sheet("attacks", f"{self._served.name}: successful attacks told from {len(clean)} clean images", rows)

    def other_rows_sheet(self) -> Sheet:
        """The same for images on which the attack failed, and for all together, each kind with its true share."""
        clean, rows = self._of(TEST, CLEAN), []
        for name in self.attacks:
            failed = self._known(SetKey(TEST, f"{name} failed"))
            if failed is None or len(failed) == 0:
                continue
            given, of_failed = self._material.images[name], auroc(clean, failed)
            share = self._material.fooled[name] / given
            rows.append({
                "attack": name, "images": len(failed), "given": given, "failed": given - self._material.fooled[name],
                "AUROC of failed": of_failed,
                "AUROC of all": share * auroc(clean, self._of(TEST, name)) + (1 - share) * of_failed,
            })  # fmt: skip
        return Sheet("failed", "attacks that failed, and all together", rows)

    def worst_case_sheet(self) -> Sheet:
        """MEAD: an image counts as detected only where every successful attack on it is flagged."""
        rows = []
        for rate in RATES:
            missed: dict[int, bool] = {}
            for name in self.attacks:
                seen = self._material.of(SEES, SetKey(TEST, name))
                assert seen is not None
                flagged = self._flagged(SetKey(TEST, name), rate, self._served.calibration)
                for image, found in zip(seen.ids.tolist(), flagged.tolist(), strict=True):
                    missed[image] = missed.get(image, False) or not found
            detected = len(missed) - sum(missed.values())
            low, high = clopper_pearson(detected, len(missed))
            rows.append({
                "allowed": rate, "images": len(missed), "attacks": len(self.attacks),
                "all flagged": detected / len(missed), "low": low, "high": high,
            })  # fmt: skip
        return Sheet("worst_case", "images of which every successful attack is flagged (MEAD)", rows)

    def false_alarm_sheet(self) -> Sheet:
        """One row a kind of images that are not attacked: how many are flagged."""
        right = self._material.right[SetKey(TEST, CLEAN)]
        calibration, rows = self._served.calibration, []

        def add(kind: str, key: SetKey, chosen: npt.NDArray[np.bool_] | None, expected: bool = False) -> None:
            chosen = np.ones(len(self._of_key(key)), bool) if chosen is None else chosen
            if not chosen.any():
                return
            row: dict[str, object] = {"images": kind, "number": int(chosen.sum())}
            for rate in RATES:
                flagged = self._flagged(key, rate, calibration)[chosen]
                row[f"flagged at {rate:.0%}"] = float(flagged.mean())
                low, high = clopper_pearson(int(flagged.sum()), len(flagged))
                row[f"95 % at {rate:.0%}"] = f"{low:.4f}-{high:.4f}"
                if expected and rate >= calibration.smallest_rate:
                    labels = self._material.labels[key][chosen]
                    ends = calibration.expected_range(rate, len(flagged), labels=labels)
                    row[f"expected at {rate:.0%}"] = f"{ends[0]:.4f}-{ends[1]:.4f}"
                else:
                    row[f"expected at {rate:.0%}"] = None
            rows.append(row)

        add("clean", SetKey(TEST, CLEAN), None, expected=True)
        add("clean, label right", SetKey(TEST, CLEAN), right)
        add("clean, label wrong", SetKey(TEST, CLEAN), ~right)
        for name in self.attacks:
            key = SetKey(TEST, f"noise-{name}")
            if self._known(key) is not None:
                add(f"noise as long as {name}, label right", key, self._material.right[key])
        for key in self._material.right:
            if key.split == "foreign":
                add(f"foreign: {key.name}", key, None)
        return Sheet("false_alarms", "images that are not attacked", rows)

    def corruption_sheet(self) -> Sheet:
        """False alarms on corrupted images whose label is still right, for each corruption and severity."""
        found: dict[str, dict[int, tuple[float, float, int]]] = {}
        for key in self._material.right:
            name, _, severity = key.name.rpartition("-")
            if key.split != TEST or name not in CORRUPTIONS:
                continue
            right = self._material.right[key]
            flagged = self._flagged(key, RATES[0], self._served.calibration)
            of_right = float(flagged[right].mean()) if right.any() else float("nan")
            found.setdefault(name, {})[int(severity)] = (of_right, float(flagged.mean()), len(right))
        severities = sorted({severity for row in found.values() for severity in row})
        rows: list[dict[str, object]] = []
        for name, row in found.items():
            rows.append({"corruption": name, **{f"severity {s}": row[s][1] for s in severities},
                         **{f"severity {s}, label right": row[s][0] for s in severities}})  # fmt: skip
        if rows:
            columns = [column for column in rows[0] if column != "corruption"]
            means = {column: float(np.nanmean([float(str(row[column])) for row in rows])) for column in columns}
            rows.append({"corruption": "mean", **means})
        return Sheet("corruptions", "corrupted images flagged where 5 % of clean ones may be", rows)

    def class_sheet(self) -> Sheet:
        """False alarms of each predicted class, with one threshold and with one for each class."""
        key = SetKey(TEST, CLEAN)
        labels, of_calibration = self._material.labels[key], self._material.labels[SetKey(CALIBRATION, CLEAN)]
        scores = self._of(TEST, CLEAN)
        own = Calibration(self._of(CALIBRATION, CLEAN), of_calibration)
        one, rate, rows = own.pooled().p_values(scores), RATES[0], []
        each = own.p_values(scores, labels)
        for label in np.unique(labels).tolist():
            mine = labels == label
            rows.append({
                "class": label, "images": int(mine.sum()), "calibration": int((of_calibration == label).sum()),
                "one threshold": float((one[mine] <= rate).mean()), "own threshold": float((each[mine] <= rate).mean()),
            })  # fmt: skip
        return Sheet("classes", "false alarms at 5 % by predicted class", rows)

    def curves(self) -> list[Curve]:
        """A ROC curve for each attack."""
        clean, curves = self._of(TEST, CLEAN), []
        for name in self.attacks:
            found = self._of(TEST, name)
            truth = np.arange(len(clean) + len(found)) >= len(clean)
            alarms, detected, _ = roc_curve(truth, np.concatenate([clean, found]))
            curves.append(Curve(name, auroc(clean, found), alarms, detected))
        return curves

    def unseen_sheet(self, methods: Sequence[Baseline]) -> Sheet:
        """For each method and each attack: AUROC when the attack's family, or its norm, was not fitted on."""
        rows = []
        for method in methods:
            for kind, groups in self._groups():
                for group, members in groups.items():
                    known = [recipe for recipe in self._fitted_on if recipe not in members]
                    judged = [recipe for recipe in self.attacks if recipe in members]
                    if not known or not judged:
                        continue
                    found = self._fitted(method, known, judged)
                    rows += [
                        {"detector": method.name, "left out": f"{kind} {group}", "attack": name, "AUROC": value}
                        for name, value in found.items()
                    ]
        return Sheet("unseen", "attacks of a family, or of a norm, that was left out of the fitting", rows)

    def worst_unseen(self, unseen: Sheet, methods: Sequence[Baseline]) -> Sheet:
        """The worst cell of each method."""
        rows = []
        for method in methods:
            for kind in ("attack", "norm"):
                cells = [
                    row
                    for row in unseen.rows
                    if row["detector"] == method.name and str(row["left out"]).startswith(kind)
                ]
                if cells:
                    worst = min(cells, key=lambda row: float(str(row["AUROC"])))
                    mean = float(np.mean([float(str(row["AUROC"])) for row in cells]))
                    rows.append({"detector": method.name, "left out": kind, **self._counts(method),
                                 "worst attack": worst["attack"], "worst AUROC": worst["AUROC"],
                                 "mean AUROC": mean})  # fmt: skip
        return Sheet("worst_unseen", "the worst unseen attack of each detector", rows)

    def method_sheet(self, name: str, title: str, methods: Sequence[Baseline]) -> Sheet:
        """AUROC of each method on each attack, all fitted on what the bundle's detector was fitted on."""
        rows = []
        for method in methods:
            found = self._fitted(method, self._fitted_on, self.attacks)
            cells = {attack: found.get(attack) for attack in self.attacks}
            rows.append({
                "detector": method.name, **self._counts(method), **cells,
                "mean": _mean(list(found.values())), "worst": min(found.values(), default=None),
            })  # fmt: skip
        return Sheet(name, title, rows)

    def fitting_set_sheet(self, method: Baseline, sets: Mapping[str, Sequence[str]]) -> Sheet:
        """The same detector fitted on different sets of attacks: the attacks in the set, and those that are not."""
        rows = []
        for name, recipes in sets.items():
            known = [recipe for recipe in recipes if self._seen(method, SetKey(FITTING, recipe)) is not None]
            if not known:
                continue
            found = self._fitted(method, known, self.attacks)
            if not found:
                continue
            families = {family_of(recipe) for recipe in known}
            inside = [value for attack, value in found.items() if attack in known]
            outside = [value for attack, value in found.items() if family_of(attack) not in families]
            rows.append({
                "fitted on": name, "attacks": len(known), "mean of its attacks": _mean(inside),
                "worst of its attacks": min(inside, default=None), "mean of other families": _mean(outside),
                "worst of other families": min(outside, default=None), "worst of all": min(found.values()),
            })  # fmt: skip
        return Sheet("fitting_sets", "which attacks to fit on: AUROC", rows)

    def shots_sheet(self, method: Baseline) -> Sheet:
        """The same detector fitted on few images of each class."""
        rows = []
        for shots in (*self._protocol.shots, None):
            found = self._fitted(method, self._fitted_on, self.attacks, shots)
            if not found:
                continue  # no attack succeeded on any of so few images
            rows.append({
                "images of each class": "all" if shots is None else str(shots), **found,
                "mean": _mean(list(found.values())),
            })  # fmt: skip
        return Sheet("shots", "fitted on few clean images of each class, and as many of each attack: AUROC", rows)

    def matrix(self, method: Baseline) -> Matrix:
        """Fitted on one attack, judged by each."""
        names = _spread_over_families(
            [name for name in self.attacks if self._seen(method, SetKey(FITTING, name)) is not None],
            self._protocol.matrix,
        )
        found = np.full((len(names), len(names)), np.nan)
        for place, name in enumerate(names):
            row = self._fitted(method, [name], names)
            found[place] = [row.get(other, np.nan) for other in names]
        return Matrix(names, names, found)

    def calibrated(self, method: Baseline) -> tuple[Score, Calibration]:
        """A method fitted on what the bundle's detector was fitted on, and its scores of calibration images.

        Raises:
            DataError: it cannot be fitted on so few attacked images.
        """
        score, usual = self._score(method, self._fitted_on), self._seen(method, SetKey(CALIBRATION, CLEAN))
        assert usual is not None
        return score, Calibration(score(usual.rows))

    def _groups(self) -> Iterator[tuple[str, dict[str, set[str]]]]:
        every = [*self._fitted_on, *(name for name in self.attacks if name not in self._fitted_on)]
        families: dict[str, set[str]] = {}
        norms: dict[str, set[str]] = {}
        for name in every:
            families.setdefault(family_of(name), set()).add(name)
            norms.setdefault(self._material.norms[name], set()).add(name)
        yield "attack", families
        yield "norm", norms

    def _fitted(
        self, method: Baseline, known: Sequence[str], judged: Sequence[str], shots: int | None = None
    ) -> dict[str, float]:
        """AUROC of a method fitted on the attacks `known`, for each attack of `judged` that it saw.

        Empty where it cannot be fitted on so few attacked images.
        """
        try:
            score = self._score(method, known, shots)
        except DataError as error:
            log.warning("%s fitted on %s is left out: %s", method.name, ", ".join(known), error)
            return {}
        test = self._seen(method, SetKey(TEST, CLEAN))
        assert test is not None
        usual, found = score(test.rows), {}
        for name in judged:
            rows = self._seen(method, SetKey(TEST, name))
            if rows is not None:
                found[name] = auroc(usual, score(rows.rows))
        return found

    def _score(self, method: Baseline, known: Sequence[str], shots: int | None = None) -> Score:
        clean = self._seen(method, SetKey(FITTING, CLEAN))
        seen = {name: self._seen(method, SetKey(FITTING, name)) for name in known}
        attacked = {name: part for name, part in seen.items() if part is not None}
        assert clean is not None
        if shots is not None:
            clean, attacked = self._few(clean, attacked, shots)
        return method.fit(clean, attacked)

    def _few(
        self, clean: Observed, attacked: Mapping[str, Observed], shots: int
    ) -> tuple[Observed, dict[str, Observed]]:
        """The first `shots` clean images of each predicted class, and those attacked images that come from them."""
        labels = self._material.labels[SetKey(FITTING, CLEAN)][: len(clean)]
        chosen = np.zeros(len(clean), bool)
        for label in np.unique(labels):
            chosen[np.flatnonzero(labels == label)[:shots]] = True
        kept = clean.ids[chosen]
        few = {name: part.at(np.isin(part.ids, kept)) for name, part in attacked.items()}
        return clean.at(chosen), {name: part for name, part in few.items() if len(part)}

    def _counts(self, method: Baseline) -> dict[str, object]:
        """How many images a method sees, clean and attacked: some are too costly for all."""

        def count(split: str, attacks: Sequence[str]) -> int:
            parts = [self._seen(method, SetKey(split, name)) for name in (CLEAN, *attacks)]
            return sum(len(part) for part in parts if part is not None)

        return {"images fitted on": count(FITTING, self._fitted_on), "images judged by": count(TEST, self.attacks)}

    def _seen(self, method: Baseline, key: SetKey) -> Observed | None:
        seen = self._material.of(method.sees, key)
        return seen if seen is None else seen.at(slice(limit_of(method, self._protocol)))

    def _detected(self, found: Scores, key: SetKey, rate: float, calibration: Calibration) -> dict[str, object]:
        flagged = int(self._flagged(key, rate, calibration).sum())
        low, high = clopper_pearson(flagged, len(found))
        return {f"TPR at {rate:.0%}": flagged / len(found), f"95 % at {rate:.0%}": f"{low:.3f}-{high:.3f}"}

    def _flagged(self, key: SetKey, rate: float, calibration: Calibration) -> npt.NDArray[np.bool_]:
        labels = self._material.labels[key]
        return np.asarray(calibration.p_values(self._of_key(key), labels) <= rate)

    def _of(self, split: str, name: str) -> Scores:
        return self._of_key(SetKey(split, name))

    def _known(self, key: SetKey) -> Scores | None:
        return None if self._material.of(SEES, key) is None else self._of_key(key)

    def _of_key(self, key: SetKey) -> Scores:
        """Scores of the bundle's detector, computed once."""
        if key not in self._scores:
            seen = self._material.of(SEES, key)
            assert seen is not None
            self._scores[key] = self._served.score(seen.rows)
        return self._scores[key]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spread_over_families(names: Sequence[str], at_most: int) -> list[str]:
    """The first of each family, then the second of each, until there are enough; in the order of `names`."""
    places: dict[str, int] = {}
    ranked = []
    for name in names:
        places[family_of(name)] = places.get(family_of(name), -1) + 1
        ranked.append((places[family_of(name)], name))
    chosen = {name for _, name in sorted(ranked, key=lambda pair: pair[0])[:at_most]}
    return [name for name in names if name in chosen]
