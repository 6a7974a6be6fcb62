"""The paths of clean training images -> statistics that are kept with the bundle."""

from detector.batches import best_device
from detector.bundle import Bundle, add_usual_paths
from detector.datasets import ImageSet, Splits
from detector.errors import DataError
from detector.interpretation.usual_paths import UsualPaths, UsualPathsBuilder
from detector.model_card import write_card
from detector.network.decouple import GatedNet
from detector.paths.encoder import encode_set
from detector.paths.path_encoding import PathEncoding
from detector.stages import check_fits, probe_images


def survey_paths(network: GatedNet, images: ImageSet) -> UsualPaths:
    """Statistics of the paths of those of `images` that the network labels right; one batch in memory at a time.

    Raises:
        DataError: the network labels none right.
    """
    builder, start = UsualPathsBuilder(network.layers, len(images.class_names)), 0
    for evidence in encode_set(network, images):
        labels, ids = (values[start : start + len(evidence)] for values in (images.labels, images.ids))
        start += len(evidence)
        right = evidence.class_logits.argmax(axis=1) == labels
        builder.add(PathEncoding(evidence.path.bits[right], network.layers), labels[right], ids[right])
    usual = builder.built()
    if not len(usual.census):
        raise DataError(f"expected images in {images.name} that the network labels right, got none of {len(images)}")
    return usual


def make_usual_paths(bundle: Bundle, splits: Splits) -> Bundle:
    """Survey about 10,000 training images, as many of each class, and keep the statistics with the bundle.

    Raises:
        ArtifactError: the bundle has no decoupled network.
        DataError: the data is not what the network was trained on, or it labels none of it right.
    """
    check_fits(bundle, splits.train)
    surveyed = probe_images(splits.train)
    usual = survey_paths(bundle.network().to(best_device()), surveyed)
    made = {"data": surveyed.name, "images": len(surveyed), "labelled_right": len(usual.census)}
    grown = add_usual_paths(bundle, usual, made)
    write_card(grown)
    return grown
