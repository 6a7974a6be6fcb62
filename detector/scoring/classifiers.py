"""The classifiers that may stand behind the features: one scikit-learn pipeline each, by name.

Random forest, AdaBoost and gradient boosting are those of the field; which of all is used is chosen by
cross-validation (`detector.scoring.choice`). Each takes sample weights, so that clean and attacked images, and each
attack among them, count alike however many there are.
"""

from collections.abc import Callable, Mapping

from sklearn.base import BaseEstimator
from sklearn.ensemble import (
    AdaBoostClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from detector.errors import RequestError
from detector.scoring.dropout_network import DropoutNetwork

STEP = "classifier"


def _scaled(classifier: BaseEstimator) -> Pipeline:
    return Pipeline([("scale", StandardScaler()), (STEP, classifier)])


def _bare(classifier: BaseEstimator) -> Pipeline:
    return Pipeline([(STEP, classifier)])  # trees ask only whether a column lies below a value


def _logistic(strength: float, tolerance: float = 1e-4) -> Callable[[int], Pipeline]:
    return lambda seed: _scaled(LogisticRegression(C=strength, tol=tolerance, max_iter=1000, random_state=seed))


# Of many classes, beyond which more steps only take time: AUROC on images that were not fitted on stays the same.
_MANY = 3e-3


CLASSIFIERS: Mapping[str, Callable[[int], Pipeline]] = {
    "logistic-0.001": _logistic(0.001),
    "logistic-0.01": _logistic(0.01),
    "logistic-0.1": _logistic(0.1),
    "logistic-1": _logistic(1.0),
    "multinomial-0.003": _logistic(0.003, _MANY),
    "multinomial-0.01": _logistic(0.01, _MANY),
    "mlp": lambda seed: _scaled(DropoutNetwork(random_state=seed)),
    "hist-gradient-boosting": lambda seed: _bare(
        HistGradientBoostingClassifier(
            max_iter=200, max_features=0.3, l2_regularization=1.0, early_stopping=False, random_state=seed
        )
    ),
    "gradient-boosting": lambda seed: _bare(
        GradientBoostingClassifier(n_estimators=200, max_features="sqrt", subsample=0.5, random_state=seed)
    ),
    "random-forest": lambda seed: _bare(RandomForestClassifier(200, min_samples_leaf=2, random_state=seed)),
    "ada-boost": lambda seed: _bare(
        AdaBoostClassifier(
            DecisionTreeClassifier(max_depth=2, max_features="sqrt"), n_estimators=200, random_state=seed
        )
    ),
}


# Those that are not told "attacked" but by which attack. Each attack then has a sum of its own, and an image is as
# suspicious as the attack that explains it best makes it: images at the decision boundary and images far beyond it lie
# on opposite sides of the clean ones, which one sum of columns cannot say.
TOLD_EACH_ATTACK = frozenset({"multinomial-0.003", "multinomial-0.01", "mlp"})


def classifier_named(name: str, seed: int = 0) -> Pipeline:
    """The classifier of that name, to be fitted; its last step is called `STEP`.

    Raises:
        RequestError: there is none.
    """
    if name not in CLASSIFIERS:
        raise RequestError(f"expected a classifier of {', '.join(CLASSIFIERS)}; got {name!r}")
    return CLASSIFIERS[name](seed)
