import math

import pytest
import torch

from detector.errors import RequestError
from detector.network.gates import GateReading
from detector.network.losses import (
    OBJECTIVES,
    LabelHeads,
    alignment,
    distillation,
    input_information,
    label_information,
    objective_named,
    redundancy,
    sparsity_counted,
    sparsity_share,
)


def reading(mask, logits=None, response=None):
    mask = torch.tensor(mask)
    return GateReading(torch.tensor(logits) if logits is not None else 2 * mask - 1, mask, response)


def test_input_information_of_sure_and_different_filters_is_one_bit():
    sure = {"a": reading([[1.0], [0.0]], [[50.0], [-50.0]])}

    assert input_information(sure).item() == pytest.approx(math.log(2), abs=1e-3)


def test_input_information_of_constant_or_unsure_filters_is_nothing():
    constant = {"a": reading([[1.0], [1.0]], [[9.0], [9.0]])}
    unsure = {"a": reading([[1.0], [0.0]], [[0.0], [0.0]])}

    assert input_information(constant).item() == pytest.approx(0.0, abs=1e-4)
    assert input_information(unsure).item() == pytest.approx(0.0, abs=1e-4)


def test_input_information_equals_a_value_computed_by_hand():
    # Two equally likely images with firing probabilities 0.841345 and 0.5: H(0.6706725) - mean(H(0.841345), H(0.5)).
    readings = {"a": reading([[1.0], [0.0]], [[1.0], [0.0]])}

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    by_hand = entropy(0.6706725) - (entropy(0.841345) + entropy(0.5)) / 2
    assert input_information(readings).item() == pytest.approx(by_hand, abs=1e-5)


def test_copies_and_opposites_share_all_their_information_and_strangers_none():
    copies = {"a": reading([[1.0, 1.0], [0.0, 0.0]], [[50.0, 50.0], [-50.0, -50.0]])}
    opposites = {"a": reading([[1.0, 0.0], [0.0, 1.0]], [[50.0, -50.0], [-50.0, 50.0]])}
    four_images = [[50.0, 50.0], [50.0, -50.0], [-50.0, 50.0], [-50.0, -50.0]]
    strangers = {"a": reading([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], four_images)}

    assert redundancy(copies).item() == pytest.approx(math.log(2), abs=1e-4)
    assert redundancy(opposites).item() == pytest.approx(math.log(2), abs=1e-4)
    assert redundancy(strangers).item() == pytest.approx(0.0, abs=1e-4)


def test_redundancy_equals_a_value_computed_by_hand():
    # Two equally likely images; firing probabilities 0.841345 and 0.5, 0.5 and 0.158655.
    readings = {"a": reading([[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]])}
    p = ((0.841345, 0.5), (0.5, 0.158655))

    by_hand = 0.0
    for a in (0, 1):
        for b in (0, 1):
            given = [[q if open_ else 1 - q for q, open_ in zip(image, (a, b), strict=True)] for image in p]
            both = sum(x * y for x, y in given) / 2
            by_hand += both * math.log(both / (sum(x for x, _ in given) / 2 * sum(y for _, y in given) / 2))
    assert redundancy(readings).item() == pytest.approx(by_hand, abs=1e-5)


def test_a_layer_of_one_filter_copies_nothing():
    assert redundancy({"a": reading([[1.0], [0.0]])}).item() == 0.0


def test_sparsity_counts_filters_by_layer_or_shares_over_all():
    readings = {"a": reading([[1.0, 1.0], [1.0, 0.0]]), "b": reading([[0.0, 0.0], [0.0, 0.0]])}

    assert sparsity_counted(readings, 0.5).item() == pytest.approx(0.5 + 1.0)
    assert sparsity_share(readings, 0.5).item() == pytest.approx(0.5 - 3 / 8)


def test_alignment_is_zero_where_mask_and_response_agree_and_positive_elsewhere():
    agreeing = {"a": reading([[1.0, 0.0]], response=torch.tensor([[1.0, 0.0]]))}
    opposed = {"a": reading([[1.0, 0.0]], response=torch.tensor([[0.0, 1.0]]))}

    p = math.e / (1 + math.e)
    by_hand = ((1 - p) * math.log((1 - p) / p) + p * math.log(p / (1 - p))) / 2
    assert alignment(agreeing).item() == pytest.approx(0.0, abs=1e-6)
    assert alignment(opposed).item() == pytest.approx(by_hand, abs=1e-5)


def test_alignment_needs_readings_taken_in_training():
    with pytest.raises(RequestError, match="expected readings of a network in training mode"):
        alignment({"a": reading([[1.0]])})


def test_a_head_that_knows_nothing_gives_the_entropy_of_the_labels():
    heads = LabelHeads({"a": 3, "b": 2}, 4)
    for head in heads.heads:
        torch.nn.init.zeros_(head.weight)
    readings = {"a": reading([[1.0, 0.0, 1.0]]), "b": reading([[1.0, 1.0]])}

    loss = label_information(heads(readings), torch.tensor([2]))

    assert loss.item() == pytest.approx(2 * math.log(4))


def test_distillation_is_zero_only_for_equal_answers():
    logits = torch.tensor([[1.0, 2.0, 3.0]])

    assert distillation(logits, logits + 5).item() == pytest.approx(0.0, abs=1e-6)
    assert distillation(logits, -logits).item() > 0.1


def test_the_published_objective_is_a_preset_and_an_unknown_one_is_refused():
    published = objective_named("li2020")

    assert (published.label_information, published.alignment, published.sparsity) == (0.01, 1.0, 1.5e-4)
    assert not published.normalised
    with pytest.raises(RequestError, match=f"expected an objective of {', '.join(OBJECTIVES)}; got 'best'"):
        objective_named("best")
