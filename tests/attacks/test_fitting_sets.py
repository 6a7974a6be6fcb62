import numpy as np
import pytest

from attacks.craft import craft
from attacks.fitting_sets import fitting_recipes, named_sets
from attacks.recipes import RECIPES
from attacks.store import AttackStore, Origin, ShardKey
from detector.errors import RequestError
from tests.oracles import MeanBoundary, grey_images

STORED = ("fgsm", "fgsm-2", "pgd-1", "pgd-l2", "deepfool", "pgd-frozen", "pgd-transfer")


@pytest.fixture
def store(tmp_path):
    images = grey_images(0.4, 2)
    labels = np.zeros(2, np.int64)
    crafted = craft(RECIPES["fgsm"], MeanBoundary(), images, MeanBoundary()(images).argmax(dim=1))
    parameters = {name: RECIPES[name].parameters for name in STORED}
    parameters["adaptive-joint"] = {**RECIPES["pgd"].parameters, "detector": "some"}
    with AttackStore.writing(tmp_path, Origin("network", "grey", 0, 2)) as writer:
        for name, known in parameters.items():
            writer.note(writer.write(ShardKey("fitting", name, 0), labels, labels, crafted, known))
    return AttackStore(tmp_path)


def test_weak_attacks_are_small_or_minimum_norm_and_only_usual_ones_are_fitted_on(store):
    assert named_sets(store) == {
        "weak": ["fgsm-2", "pgd-1", "deepfool"],
        "strong": ["fgsm", "pgd-l2"],
        "all": ["fgsm", "fgsm-2", "pgd-1", "pgd-l2", "deepfool"],
    }


def test_recipes_by_name_are_taken_as_they_are(store):
    assert fitting_recipes(store, "pgd-frozen, fgsm") == ["pgd-frozen", "fgsm"]
    with pytest.raises(RequestError, match="expected weak, strong, all or some of the attacks fgsm, .*; got 'cw'"):
        fitting_recipes(store, "cw")
