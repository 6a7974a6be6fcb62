"""Attacks carried on past the point where they stopped: further positives to fit on, without a further pass.

Attacks that stop at the decision boundary leave an image of which the network is unsure; attacks that run all their
steps leave one of which it is surer than of any clean image. A classifier that was fitted on the first kind alone takes
sureness for innocence, and ranks the second kind below clean images. What an attack did to an image's class logits,
gate logits and gate inputs is known from the clean image that it began with; here it is done again, several times over.
Neither image nor attack is needed for that, so that it also stands for attacks that nobody has stored.

A straight line is what the logits follow where the network is linear, as it nearly is around an image (Goodfellow et
al., "Explaining and Harnessing Adversarial Examples", ICLR 2015); further out it is a guess, which is judged by attacks
left out (`detector.scoring.choice`).
"""

import numpy as np

from detector.paths.encoder import Floats
from detector.paths.evidence_shape import EvidenceShape, rows_of
from detector.scoring.sample import Sample

# By how many times the length of its change an attack is carried on: between these two, evenly in logarithms.
LEAST, MOST = 0.5, 4.0


def overshot(clean: Sample, attacked: Sample, seed: int = 0) -> Sample:
    """The attacked images whose clean image is known, each carried on by a length of its own.

    Args:
        clean: clean images.
        attacked: images that were made of some of them, and of others.
        seed: of the lengths.

    Returns:
        As many images as have their id in `clean`, in their order; none of them need be one that pixels could show.
    """
    places = {image: place for place, image in enumerate(clean.ids.tolist())}
    known = attacked.at(np.isin(attacked.ids, clean.ids))
    before = clean.evidence.at(np.array([places[image] for image in known.ids.tolist()], np.int64))
    lengths = np.exp(np.random.default_rng(seed).uniform(np.log(LEAST), np.log(MOST), len(known)))[:, None]

    def beyond(start: Floats, end: Floats) -> Floats:
        return np.asarray(end + lengths * (end - start), np.float32)

    shape = EvidenceShape.of(clean.evidence)
    return Sample(shape.evidence(beyond(rows_of(before), rows_of(known.evidence))), known.ids)
