import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter

from detector.baselines.activations import HEAD, ActivationReader
from detector.baselines.all import all_baselines
from detector.baselines.baseline import Observed, fitted_on
from detector.baselines.critical_paths import CriticalPaths, control_gates
from detector.baselines.effective_path import smallest_set
from detector.baselines.kernel_density import log_density
from detector.baselines.lid import local_dimension
from detector.baselines.squeezing import fewer_bits, median_filtered, non_local_means
from detector.errors import DataError
from detector.network.decouple import decouple
from detector.network.networks import build_network
from detector.scoring.evaluation import auroc

NAMES = ["max-softmax", "pooled activations", "Mahalanobis", "kernel density", "LID", "feature squeezing",
         "effective path", "CDRP"]  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return decouple(build_network("resnet8", 1, 4)).eval()


@pytest.fixture(scope="module")
def reader(network):
    return ActivationReader(network, torch.rand(1, 1, 8, 8))


def one(network, name):
    return next(baseline for baseline in all_baselines(network, torch.rand(1, 1, 8, 8)) if baseline.name == name)


def made_up(reader, hidden, logits):
    """Rows of a reader whose last layer and logits are given; all other activations are zero."""
    rows = np.zeros((len(hidden), reader.classes + sum(reader.layers.values())), np.float32)
    rows[:, : reader.classes] = logits
    rows[:, -hidden.shape[1] :] = hidden
    return rows


def test_all_baselines_are_there(network):
    assert [baseline.name for baseline in all_baselines(network, torch.rand(1, 1, 8, 8))] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_seen_of_an_image_does_not_depend_on_its_batch_and_strange_images_stand_out(network, name):
    baseline = one(network, name)
    clean, odd = torch.rand(40, 1, 8, 8), 0.5 + 0.5 * torch.rand(40, 1, 8, 8).round()

    seen, strange = baseline.observe(clean), baseline.observe(odd)
    alone = np.concatenate([baseline.observe(image[None]) for image in clean[:4]])
    score = baseline.fit(Observed(seen, np.arange(40)), {"odd": Observed(strange, np.arange(40))})

    np.testing.assert_allclose(alone, seen[:4], atol=1e-4)
    assert np.isfinite(score(seen)).all()
    assert score(seen).shape == (40,)
    if name not in ("max-softmax", "kernel density", "feature squeezing"):  # those are not fitted on what is strange
        assert auroc(score(seen), score(strange)) > 0.6
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("name", NAMES[:6])
def test_an_attacker_sees_the_score_that_is_judged_with_a_gradient(network, name):
    baseline, images = one(network, name), torch.rand(40, 1, 8, 8)
    seen = Observed(baseline.observe(images), np.arange(40))
    odd = Observed(baseline.observe(images.round()), np.arange(40))
    score = baseline.fit(seen, {"odd": odd})
    wanting = (0.95 * images).requires_grad_(True)

    trace = score.trace(wanting)
    scores = score.of(trace.rows)
    (gradient,) = torch.autograd.grad(scores.sum(), wanting)

    np.testing.assert_allclose(scores.detach(), score(baseline.observe(wanting.detach())), rtol=1e-4, atol=1e-4)
    logits, readings = network.trace(wanting)
    assert torch.allclose(trace.logits, logits, atol=1e-5)
    assert torch.allclose(trace.gates, torch.cat([part.logits for part in readings.values()], dim=1), atol=1e-5)
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).float().mean() > 0.9


def test_activations_are_the_means_of_each_channel_where_it_enters_a_convolution(network, reader):
    images = torch.rand(3, 1, 8, 8)
    inputs = []
    first = network.graph.get_submodule(next(iter(network.layers)))
    handle = first.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = network(images)
    handle.remove()

    rows = reader.rows(images)

    np.testing.assert_allclose(reader.logits(rows), logits, atol=1e-6)
    name = next(iter(network.layers))
    np.testing.assert_allclose(reader.by_layer(rows)[name], inputs[0].mean(dim=(2, 3)), atol=1e-6)
    assert list(reader.layers) == [*network.layers, HEAD]


def test_max_softmax_orders_images_by_their_largest_probability(network, reader):
    logits = np.array([[0, 0, 0, 0], [40, 0, 0, 0], [41, 0, 0, 0], [1, 0, 0, 0]], np.float32)
    score = one(network, "max-softmax").fit(None, None)

    scores = score(made_up(reader, np.zeros((4, 64), np.float32), logits))

    assert scores[0] == pytest.approx(np.log(3))
    assert np.argsort(scores).tolist() == [2, 1, 3, 0]


def test_local_dimension_of_a_case_computed_by_hand():
    references = torch.tensor([[1.0], [2.0], [4.0], [100.0]])

    found = local_dimension(torch.tensor([[0.0]]), references, neighbours=3)

    assert found[0] == pytest.approx(-1 / np.mean(np.log([1 / 4, 2 / 4, 1])))


def test_local_dimension_counts_the_dimensions_of_a_cube():
    chooser = np.random.default_rng(0)
    for dimensions in (1, 3):
        cube = torch.zeros(4000, 5)
        cube[:, :dimensions] = torch.from_numpy(chooser.random((4000, dimensions)))
        within = cube[:50] * 0.2 + 0.4 * (cube[:50] > 0)
        assert float(local_dimension(within, cube).median()) == pytest.approx(dimensions, rel=0.35)


def test_mahalanobis_takes_the_distance_to_the_nearest_class(network, reader):
    chooser = np.random.default_rng(0)
    labels = chooser.integers(2, size=600)
    hidden = np.zeros((600, 64), np.float32)
    hidden[:, :2] = chooser.normal(size=(600, 2)) * [1, 3] + np.where(labels[:, None], [8, 0], [0, 0])
    clean = made_up(reader, hidden, 5 * np.eye(4)[labels])
    points = np.zeros((3, 64), np.float32)
    points[:, :2] = [[8, 0], [4, 0], [0, 4]]  # at a class's mean; between both, 4 deviations; one and a bit away
    apart = np.pad(np.add(chooser.normal(size=(600, 2)), [4, 0]), ((0, 0), (0, 62)))
    far = made_up(reader, apart, 5 * np.eye(4)[labels])
    score = one(network, "Mahalanobis").fit(Observed(clean, np.arange(600)), {"far": Observed(far, np.arange(600))})

    at_mean, between, aside = score(made_up(reader, points, 5 * np.eye(4)[[1, 1, 0]]))

    assert at_mean < aside < between


def test_kernel_density_is_that_of_the_predicted_class(network, reader):
    chooser = np.random.default_rng(0)
    labels = chooser.integers(2, size=400)
    hidden = np.zeros((400, 64), np.float32)
    hidden[:, 0] = chooser.normal(size=400) * 0.5 + np.where(labels, 6, 0)
    score = one(network, "kernel density").fit(
        Observed(made_up(reader, hidden, 5 * np.eye(4)[labels]), np.arange(400)), None
    )
    points = np.zeros((3, 64), np.float32)
    points[:, 0] = [0, 6, 3]

    nearby = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    by_hand = np.log((np.exp(-0.5 * 9 / 4) + np.exp(-0.5 * 4 / 4)) / 2 / (2 * np.sqrt(2 * np.pi)))
    assert float(log_density(torch.tensor([[3.0]], dtype=torch.float64), nearby, 2.0)) == pytest.approx(by_hand)
    usual, other, between = score(made_up(reader, points, 5 * np.eye(4)[[0, 0, 0]]))
    (never,) = score(made_up(reader, points[:1], 5 * np.eye(4)[[3]]))

    assert usual < between < other < never


def test_squeezers_do_what_they_say():
    images = torch.rand(2, 3, 9, 9)

    assert len(fewer_bits(images).unique()) <= 32
    assert (fewer_bits(images) - images).abs().max() <= 0.5 / 31 + 1e-6
    expected = np.stack([[median_filter(plane, size=2, mode="reflect") for plane in image] for image in images.numpy()])
    np.testing.assert_allclose(median_filtered(images), expected, atol=1e-6)
    flat = torch.full((1, 1, 9, 9), 0.25)
    np.testing.assert_allclose(non_local_means(flat), flat, atol=1e-6)
    noisy = flat + torch.randn(1, 1, 9, 9) / 255
    assert (non_local_means(noisy) - 0.25).square().mean() < 0.3 * (noisy - 0.25).square().mean()
    edge = torch.zeros(1, 1, 9, 9)
    edge[..., 5:] = 1
    np.testing.assert_allclose(non_local_means(edge), edge, atol=1e-3)


def test_non_local_means_are_as_weak_and_as_wide_as_theirs_for_cifar10():
    levels = torch.full((1, 1, 15, 15), 100.0)
    levels[..., 13] = 104  # a column 6 places from the middle one, whose neighbourhoods differ by 0, 4 and 4 x 4 levels

    middle = non_local_means(levels / 255)[0, 0, 7, 7] * 255

    # 13 x 13 pixels around: 11 columns like its own, one beside the brighter column, the brighter one, 3 x 3 patches
    beside, on = np.exp(-(16 / 3) / 4), np.exp(-(16 / 3) / 4)
    assert middle == pytest.approx((11 * 100 + beside * 100 + on * 104) / (11 + beside + on), abs=1e-3)


def test_attacks_weigh_alike_however_many_images_they_have():
    chooser = np.random.default_rng(0)

    def cloud(first, second, count):
        return Observed(np.float32(np.add(chooser.normal(size=(count, 2)), [first, second])), np.arange(count))

    score = fitted_on(lambda rows: rows, cloud(0, 0, 1000), {"many": cloud(2, 0, 2000), "few": cloud(0, 2, 100)})

    many, few = (score(np.eye(2, dtype=np.float32)) - score(np.zeros((1, 2), np.float32))).tolist()
    assert few == pytest.approx(many, rel=0.3)


@pytest.mark.parametrize("name", ["LID", "Mahalanobis", "CDRP"])
def test_what_is_fitted_on_attacks_says_so_where_there_are_none(network, name):
    baseline = one(network, name)
    clean = Observed(baseline.observe(torch.rand(40, 1, 8, 8)), np.arange(40))
    none = Observed(clean.rows[:1], clean.ids[:1])  # image 0, which is one of LID's references

    with pytest.raises(DataError, match="expected at least one attack that fooled the network, got none to fit on"):
        baseline.fit(clean, {"pgd": none if name == "LID" else none.at(slice(0))})


def test_the_forest_has_the_seed_it_is_given(network):
    clean, odd = (Observed(torch.rand(40, 6).numpy(), np.arange(40)) for _ in range(2))

    first, same, other = (CriticalPaths(network, seed).fit(clean, {"odd": odd})(clean.rows) for seed in (1, 1, 2))

    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_feature_squeezing_takes_the_largest_of_the_three_distances(network):
    score = one(network, "feature squeezing").fit(None, None)

    assert score(np.array([[0.1, 0.7, 0.2]], np.float32)) == pytest.approx([0.7])


def test_the_smallest_set_that_carries_a_share():
    contributions = torch.tensor([[4.0, -9.0, 3.0, 2.0, 1.0], [0.0, -1.0, 0.0, 0.0, 0.0]])

    assert smallest_set(contributions, 0.5).tolist() == [[True, False, True, False, False], [False] * 5]
    assert smallest_set(contributions, 1.0)[0].tolist() == [True, False, True, True, True]


def test_control_gates_keep_the_label_and_close_what_it_does_not_need(network):
    images = torch.rand(4, 1, 8, 8)
    before = [weights.clone() for weights in network.parameters()]

    gates = control_gates(network, images)

    assert gates.shape == (4, sum(network.layers.values()))
    assert (gates >= 0).all()
    assert gates.mean() < 0.9
    assert all(torch.equal(weights, was) for weights, was in zip(network.parameters(), before, strict=True))
    assert all(weights.requires_grad for weights in network.parameters())
