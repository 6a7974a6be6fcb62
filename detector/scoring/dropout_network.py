"""A small network whose hidden units are left out at random while it is fitted, which scikit-learn's own are not.

Dropout: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014. Without it,
hundreds of gate logits of a few thousand images are learnt by heart. What is fitted is an `MLPClassifier` of
scikit-learn, as which it is saved and served.
"""

from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.neural_network import MLPClassifier
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

# Chosen on the fitting split: docs/detection.md.
UNITS, DROPOUT, EPOCHS, BATCH = 128, 0.3, 20, 512
STEPS = 600  # at least: few rows are gone through more often
RATE, DECAY = 4e-3, 0.3  # of AdamW


class DropoutNetwork(ClassifierMixin, BaseEstimator):
    """One hidden layer of rectified units; of two classes it has one output, of more one for each."""

    def __init__(self, units: int = UNITS, random_state: int | np.random.RandomState | None = None) -> None:
        """A network to be fitted.

        Args:
            units: of the hidden layer.
            random_state: of weights, order and dropout.
        """
        self.units = units
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike, sample_weight: npt.ArrayLike | None = None) -> Self:
        """Fit on rows `(samples, columns)` of two classes or more.

        Args:
            X: best standardised.
            y: the class of each row, `(samples,)`.
            sample_weight: how much each row counts, `(samples,)`; None for all alike.

        Raises:
            ValueError: the rows are not finite numbers, or of another length than `y`.
        """
        rows, labels = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(labels)
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        # One step on one row: all that scikit-learn keeps of a fitted network is then there.
        network = MLPClassifier((self.units,), random_state=self.random_state)
        network.partial_fit(rows[:1], labels[:1], classes=self.classes_)
        for left in ("_optimizer", "_best_coefs", "_best_intercepts"):  # larger than the network, and of no more use
            network.__dict__.pop(left, None)
        weights = np.ones(len(rows)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        seed = int(check_random_state(self.random_state).randint(2**31))
        layers = _trained(rows, numbers, weights / weights.mean(), self.units, network.n_outputs_, seed)
        network.coefs_ = [np.ascontiguousarray(layer.weight.detach().numpy().T) for layer in layers]
        network.intercepts_ = [layer.bias.detach().numpy() for layer in layers]
        self.network_ = network
        return self

    def predict_proba(self, X: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The share of each class, `(samples, classes)`."""
        check_is_fitted(self)
        shares: npt.NDArray[np.float32] = self.network_.predict_proba(validate_data(self, X, reset=False))
        return shares

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.generic]:
        """The likeliest class, `(samples,)`."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])


def _trained(
    X: npt.NDArray[np.float32], numbers: npt.NDArray[np.intp], counts: npt.NDArray[np.float64], units: int,
    outputs: int, seed: int,
) -> tuple[nn.Linear, nn.Linear]:  # fmt: skip
    """The two layers of a network that tells the classes apart."""
    rows, labels, weights = torch.from_numpy(X), torch.from_numpy(numbers), torch.from_numpy(counts).float()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)  # not those of GPUs, which nobody draws from here
        layers = nn.Linear(X.shape[1], units), nn.Linear(units, outputs)
        network = nn.Sequential(layers[0], nn.ReLU(), nn.Dropout(DROPOUT), layers[1])
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
        epochs = max(EPOCHS, STEPS * BATCH // max(len(rows), BATCH))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for part in torch.randperm(len(rows)).split(BATCH):
                optimizer.zero_grad(set_to_none=True)
                (_losses(network(rows[part]), labels[part]) * weights[part]).mean().backward()
                optimizer.step()
            schedule.step()
    return layers


def _losses(answers: Tensor, labels: Tensor) -> Tensor:
    if answers.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(answers[:, 0], labels.float(), reduction="none")
    return F.cross_entropy(answers, labels, reduction="none")
