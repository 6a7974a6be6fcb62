"""The scikit-learn classifier that tells usual paths from unusual ones."""

from typing import Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from detector.scoring.classifiers import classifier_named
from detector.scoring.sums import odds_of_sums
from detector.scoring.thresholds import Calibration


def default_estimator(seed: int = 0) -> BaseEstimator:
    """Logistic regression on standardised columns: quick, and each column's part in a score can be named."""
    return classifier_named("logistic-0.01", seed)


def log_odds(share: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Probabilities in [0, 1] -> unbounded scores; those within 1e-9 of an end count as at that distance."""
    inside = np.clip(np.asarray(share, np.float64), 1e-9, 1 - 1e-9)
    return np.asarray(np.log(inside) - np.log1p(-inside), np.float64)


class FalseAlarmClassifier(ClassifierMixin, BaseEstimator):
    """Flags the positive class only above a threshold that a given share of the negatives may pass.

    `fit` sets the threshold on the negatives it is given; `calibrate` sets it anew on fresh ones, because scores of
    images that were fitted on are too low.
    """

    def __init__(self, estimator: BaseEstimator | None = None, max_false_alarms: float = 0.05) -> None:
        """Wrap a scikit-learn classifier.

        Args:
            estimator: any classifier; None for `default_estimator()`. One that was fitted on more than two classes
                counts as positive whatever is of a class above 0.
            max_false_alarms: share of the negatives allowed above the threshold, in (0, 1).
        """
        self.estimator = estimator
        self.max_false_alarms = max_false_alarms

    def __sklearn_tags__(self) -> Tags:
        tags: Tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Fit on rows `(samples, features)` of two classes; the larger label is the positive one.

        Raises:
            ValueError: there are not two classes, or the rows are not finite numbers.
        """
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) != 2:
            raise ValueError(
                f"Only binary classification is supported: expected 2 classes, got {len(self.classes_)} class"
            )
        self.estimator_ = clone(self.estimator if self.estimator is not None else default_estimator())
        self.estimator_.fit(X, y == self.classes_[1])
        negatives = self.score_samples(np.asarray(X)[y == self.classes_[0]])
        self.threshold_ = float(np.quantile(negatives, 1 - self.max_false_alarms, method="higher"))
        return self

    def calibrate(self, calibration: Calibration) -> Self:
        """Set the threshold split-conformally, on scores of negatives that were not fitted on.

        Raises:
            RequestError: there are too few scores for `max_false_alarms`.
        """
        check_is_fitted(self)
        self.threshold_ = calibration.threshold(self.max_false_alarms)
        return self

    @classmethod
    def of_fitted(cls, estimator: BaseEstimator, calibration: Calibration, max_false_alarms: float) -> Self:
        """A fitted and calibrated classifier around an estimator that was fitted before, with True for flagged.

        Where the estimator knows more than two classes, the positive ones are what is flagged.

        Raises:
            RequestError: there are too few scores for `max_false_alarms`.
        """
        return cls.around(estimator, max_false_alarms).calibrate(calibration)

    @classmethod
    def around(cls, estimator: BaseEstimator, max_false_alarms: float) -> Self:
        """The same without a threshold yet: it scores, and flags nothing until it is calibrated."""
        made = cls(estimator, max_false_alarms)
        made.estimator_, made.n_features_in_ = estimator, estimator.n_features_in_
        made.classes_ = np.array([False, True])
        made.threshold_ = np.inf
        return made

    def score_samples(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """How suspicious each row is, unbounded, `(samples,)`."""
        check_is_fitted(self)
        # float64, so that probabilities near 1 can be told apart
        X = validate_data(self, X, reset=False, dtype=np.float64)
        if hasattr(self.estimator_, "decision_function"):
            decisions = np.asarray(self.estimator_.decision_function(X), np.float64)
            return decisions if decisions.ndim == 1 else self._odds(decisions)
        clean = int(np.searchsorted(self.estimator_.classes_, 0))
        return log_odds(self.estimator_.predict_proba(X)[:, clean + 1 :].sum(axis=1))

    def _odds(self, decisions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Log-odds of any attack; `decisions` are logarithms of shares, each row up to a constant of its own."""
        clean = int(np.searchsorted(self.estimator_.classes_, 0))
        above = np.delete(decisions - decisions[:, [clean]], clean, axis=1)
        return odds_of_sums(above, clean)

    def decision_function(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """How far the score lies above the threshold, `(samples,)`."""
        return self.score_samples(X) - self.threshold_

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.generic]:
        """The class of each row, `(samples,)`."""
        flagged = (self.decision_function(X) > 0).astype(np.intp)
        return np.asarray(self.classes_[flagged])
