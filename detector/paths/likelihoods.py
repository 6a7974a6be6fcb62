"""How usual a path is for the class that was predicted, layer by layer.

An image that was altered to reach a wrong label still carries, in its early layers, the path of what it shows. So each
layer is asked two things: how well its gates fit the predicted class (`fit`), and by how much they fit it better than
the best other class (`lead`, below zero where another class would explain the layer better).

Two models of a layer's gates given the class, both learnt from clean images and the labels that the network gives them:

* path bits: independent, each with the share of the class's images for which the filter is open (naive Bayes);
* gate logits: Gaussian, each class with its own mean and all with one covariance, as Lee et al. ("A Simple Unified
  Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018) model pooled activations.

Columns are log-likelihoods a filter, up to a constant that is the same for all images, so that wide layers do not
outweigh narrow ones.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from sklearn.covariance import ledoit_wolf

from detector.paths.columns import Column
from detector.paths.encoder import Floats

Arrays = Mapping[str, npt.NDArray[np.float32]]
MEASURES = ("fit", "lead")


def likelihood_columns(kind: str, layers: Mapping[str, int]) -> list[Column]:
    """Two columns of each layer, then two of the whole path."""
    return [Column(kind, layer, None, measure) for layer in (*layers, None) for measure in MEASURES]


def learn_open_shares(class_logits: Floats, gate_logits: Floats, _layers: Mapping[str, int]) -> Arrays:
    """For each class and filter, the log-odds and log-probability of the filter being open.

    Shares are smoothed by one open and one closed image (Laplace), so that what was never seen is rare, not impossible.
    A class that no clean image was predicted to be of explains each filter, open or closed, as badly as any class does:
    it never is the best explanation.

    Args:
        class_logits: of clean images, `(images, classes)`.
        gate_logits: of the same, `(images, total channels)`.
    """
    predicted = class_logits.argmax(axis=1)
    bits = gate_logits > 0
    counts = np.bincount(predicted, minlength=class_logits.shape[1])
    shares = np.stack([
        (bits[predicted == label].sum(axis=0) + 1) / (count + 2) for label, count in enumerate(counts.tolist())
    ])  # fmt: skip
    closed, odds = np.log1p(-shares), np.log(shares) - np.log1p(-shares)
    known = counts > 0
    closed[~known], odds[~known] = (closed + np.minimum(odds, 0))[known].min(axis=0), 0
    return {"closed": closed.astype(np.float32), "odds": odds.astype(np.float32)}


def path_likelihoods(class_logits: Floats, gate_logits: Floats, arrays: Arrays, layers: Mapping[str, int]) -> Floats:
    """`fit` and `lead` of the path bits, `(images, 2 (layers + 1))`.

    Args:
        class_logits: `(images, classes)`.
        gate_logits: `(images, total channels)`.
        arrays: what `learn_open_shares` gave.
        layers: gate name -> its channels.
    """
    bits = (gate_logits > 0).astype(np.float32)
    likely = [
        (bits[:, part] @ arrays["odds"][:, part].T + arrays["closed"][:, part].sum(axis=1)) / width
        for part, width in _parts(layers)
    ]
    return _fit_and_lead(likely, class_logits, layers)


def learn_gate_gaussians(class_logits: Floats, gate_logits: Floats, layers: Mapping[str, int]) -> Arrays:
    """For each layer a whitening matrix, and for each class its whitened mean.

    The covariance is shrunk as far as the number of images asks for (Ledoit and Wolf 2004).

    Args:
        class_logits: of clean images, `(images, classes)`.
        gate_logits: of the same, `(images, total channels)`.
        layers: gate name -> its channels.
    """
    predicted = class_logits.argmax(axis=1)
    everywhere = gate_logits.mean(axis=0)
    means = np.stack([
        gate_logits[predicted == label].mean(axis=0) if (predicted == label).any() else everywhere
        for label in range(class_logits.shape[1])
    ])  # fmt: skip
    centred = np.asarray(gate_logits - means[predicted], np.float64)
    known = np.isin(np.arange(class_logits.shape[1]), predicted)
    learnt = {"centre": everywhere.astype(np.float32), "known": known.astype(np.float32)}
    for place, (part, _) in enumerate(_parts(layers)):
        covariance, _shrinkage = ledoit_wolf(centred[:, part], assume_centered=True)
        values, vectors = np.linalg.eigh(covariance)
        # A filter that is the same for every image would else be divided by zero, and rounding be taken for news.
        whitening = vectors / np.sqrt(np.maximum(values, max(values.max(), 1.0) * 1e-4))
        learnt[f"whitening-{place}"] = whitening.astype(np.float32)
        learnt[f"means-{place}"] = ((means - everywhere)[:, part] @ whitening).astype(np.float32)
    return learnt


def gate_likelihoods(class_logits: Floats, gate_logits: Floats, arrays: Arrays, layers: Mapping[str, int]) -> Floats:
    """`fit` and `lead` of the gate logits, `(images, 2 (layers + 1))`.

    Args:
        class_logits: `(images, classes)`.
        gate_logits: `(images, total channels)`.
        arrays: what `learn_gate_gaussians` gave.
        layers: gate name -> its channels.
    """
    return _fit_and_lead(gaussian_likelihoods(gate_logits, arrays, layers), class_logits, layers)


def gaussian_likelihoods(values: Floats, arrays: Arrays, layers: Mapping[str, int]) -> list[Floats]:
    """For each layer the log-likelihood a column under each class, up to a constant, `(images, classes)`.

    Args:
        values: gate logits, or other values of each layer, `(images, total channels)`.
        arrays: what `learn_gate_gaussians` gave.
        layers: name of the layer -> its channels.
    """
    likely, centred = [], values - arrays["centre"]  # small numbers lose little to rounding
    for place, (part, width) in enumerate(_parts(layers)):
        white = centred[:, part] @ arrays[f"whitening-{place}"]
        means = arrays[f"means-{place}"]
        # |white - mean|² without an array of (images, classes, channels)
        squared = (white**2).sum(axis=1, keepdims=True) - 2 * white @ means.T + (means**2).sum(axis=1)
        # A class that no clean image was predicted to be of explains a layer as badly as the worst of the others.
        squared[:, arrays["known"] == 0] = squared[:, arrays["known"] == 1].max(axis=1, keepdims=True)
        likely.append(-0.5 * squared / width)
    return likely


def _parts(layers: Mapping[str, int]) -> list[tuple[slice, int]]:
    """Where each layer's filters lie, and how many they are."""
    ends = np.cumsum(list(layers.values())).tolist()
    return [(slice(end - width, end), width) for end, width in zip(ends, layers.values(), strict=True)]


def _fit_and_lead(likely: list[Floats], class_logits: Floats, layers: Mapping[str, int]) -> Floats:
    """Log-likelihoods a filter, each layer's `(images, classes)` -> the columns."""
    widths = np.array(list(layers.values()), np.float32)
    stacked = np.stack(likely)  # (layers, images, classes)
    whole = np.tensordot(widths / widths.sum(), stacked, axes=1)[None]
    of_class = np.concatenate([stacked, whole])
    first = class_logits.argmax(axis=1)[None, :, None]
    fit = np.take_along_axis(of_class, first, axis=2)
    others = of_class.copy()
    np.put_along_axis(others, first, -np.inf, axis=2)
    lead = fit[:, :, 0] - others.max(axis=2)
    both = np.stack([fit[:, :, 0], lead], axis=1)  # (layers + 1, 2, images)
    return np.ascontiguousarray(both.reshape(-1, both.shape[2]).T, dtype=np.float32)
