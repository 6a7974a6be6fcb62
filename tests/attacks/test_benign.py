import numpy as np

from attacks.benign import KINDS, NOISE, SEVERITIES, _Damaged, benign_samples
from attacks.corruptions import CORRUPTIONS
from attacks.draws import seed_of
from detector.paths.encoder import encode_set


def test_what_passes_is_every_image_of_every_kind_whose_label_stays_right(victim, digits):
    images = digits.fitting.first(30)

    found = benign_samples(victim.network, images, seed=3, at_most=20)

    assert set(found) <= set(KINDS)
    assert NOISE in found
    (clean,) = encode_set(victim.network, images)
    for sample in found.values():
        assert set(sample.ids.tolist()) <= set(images.ids[:20].tolist())
        places = [images.ids.tolist().index(index) for index in sample.ids.tolist()]
        assert (sample.evidence.class_logits.argmax(axis=1) == images.labels[places]).all()
        assert (sample.evidence.class_logits != clean.class_logits[places]).any()


def test_damage_depends_on_image_and_seed_alone_and_uses_every_severity(digits):
    images = digits.fitting.first(12)

    def damaged(ids, kind, seed=0):
        return _Damaged(images.read, kind, seed)(ids)

    for kind in (NOISE, "snow"):
        whole = damaged(images.ids, kind)
        np.testing.assert_array_equal(damaged(images.ids[5:6], kind)[0], whole[5])
        assert (damaged(images.ids, kind, 1) != whole).any()
    severities = {
        severity
        for index, image in zip(images.ids, damaged(images.ids, "contrast"), strict=True)
        for severity in SEVERITIES
        if (image == CORRUPTIONS["contrast"](images.read(np.array([index])), severity, [seed_of(0, int(index))])).all()
    }
    assert severities == set(SEVERITIES)
