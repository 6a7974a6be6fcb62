"""The faults of torchattacks 3.5.1 that are worked around here: it has them still, and ours do not.

A test named `torchattacks_...` that fails says that a fault has been mended there: what works around it can then go.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchattacks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from attacks.craft import craft
from attacks.recipes import RECIPES
from attacks.store import AttackStore, Origin, ShardKey
from tests.oracles import MeanBoundary, NearestCorner, NeverFooled, grey_images

ZEROS = torch.zeros(2, dtype=torch.long)


class Counted(nn.Module):
    """A network that notes how many images it gets at a time."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return self.network(images)


class Band(nn.Module):
    """Class 1 in a narrow band of mean pixels only, which a long step leaves again."""

    def __init__(self, centre=0.5, width=0.015):
        super().__init__()
        self.centre = nn.Parameter(torch.tensor(centre))
        self.width = width

    def forward(self, images):
        inside = 20 * (self.width - (images.mean(dim=(1, 2, 3)) - self.centre).abs())
        return torch.stack([-inside, inside], dim=1)


class Rivals(nn.Module):
    """Three classes, each for one of the first three pixels and against the two others."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images):
        own = images.flatten(1)[:, :3]
        return self.scale * (own - 0.5 * (own.sum(dim=1, keepdim=True) - own))


class Breaking(nn.Module):
    """A network that fails when it is called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        raise RuntimeError("broken network")


def grey(*levels):
    """Images of these grey levels, as they come from 8 bits, `(levels, 1, 12, 12)`."""
    images = torch.cat([grey_images(level, 1) for level in levels])
    return (images * 255).round() / 255


def test_torchattacks_runs_the_members_of_autoattack_for_ten_steps():
    members = torchattacks.AutoAttack(MeanBoundary(), n_classes=2)._autoattack.attacks

    assert [member.steps for member in members if hasattr(member, "steps")] == [10, 10, 10]


def test_autoattack_runs_its_members_for_a_hundred_steps():
    recipe = RECIPES["autoattack"]
    one_query = replace(recipe, settings={**recipe.settings, "queries": 1})

    crafted = craft(one_query, NeverFooled(), grey(0.4), ZEROS[:1])

    # APGD-CE, and APGD-T and FAB-T for each of two wrong classes.
    assert crafted.gradients[0] >= 5 * 100


def test_torchattacks_carlini_wagner_has_one_constant_which_may_be_too_small():
    images, network = grey(0.47, 0.47), MeanBoundary(0.5)

    made = torchattacks.CW(network, c=1e-4, steps=50)(images, ZEROS)

    assert network(made).argmax(dim=1).tolist() == [0, 0]


def test_carlini_wagner_finds_the_constant_that_is_needed():
    recipe = RECIPES["cw"]
    far_off = replace(recipe, settings={**recipe.settings, "start": 1e-3})

    crafted = craft(far_off, MeanBoundary(0.5), grey(0.47, 0.47), ZEROS)

    assert crafted.fooled.all()


def neighbours():
    """An image near the boundary, alone and beside one so far away that its loss still falls when the first is done."""
    return MeanBoundary(0.5), grey(0.47), grey(0.47, 0.3)


def test_torchattacks_carlini_wagner_depends_on_the_neighbours_since_it_stops_on_their_sum():
    network, image, both = neighbours()
    attack = torchattacks.CW(network, c=10.0, steps=100, lr=0.05)

    alone, beside = attack(image, ZEROS[:1]), attack(both, ZEROS)[:1]

    assert not torch.allclose(alone, beside, atol=1 / 255)


def test_carlini_wagner_does_not_depend_on_the_neighbours():
    network, image, both = neighbours()

    alone, beside = craft(RECIPES["cw"], network, image, ZEROS[:1]), craft(RECIPES["cw"], network, both, ZEROS)

    assert np.array_equal(alone.pixels, beside.pixels[:1])


def test_torchattacks_deepfool_asks_about_one_image_at_a_time():
    network = Counted(NearestCorner())

    torchattacks.DeepFool(network, steps=5)(grey(0.3, 0.35, 0.4), torch.zeros(3, dtype=torch.long))

    assert set(network.batches) == {1}


def test_deepfool_asks_about_all_images_at_once():
    network = Counted(NearestCorner())

    craft(RECIPES["deepfool"], network, grey(0.3, 0.35, 0.4), torch.zeros(3, dtype=torch.long))

    assert 1 not in network.batches[:3]


def test_torchattacks_jsma_wants_the_next_of_ten_classes_whatever_the_network_has():
    images, network = grey(0.9), NearestCorner()  # of three classes; the right one is the last

    with pytest.raises(IndexError):
        torchattacks.JSMA(network)(images, torch.tensor([2]))


@pytest.mark.parametrize("target", [0, 1])
def test_jsma_takes_the_target_that_it_is_given(target):
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 0, :3] = torch.tensor([0.2, 0.2, 0.6])
    recipe = replace(RECIPES["jsma"], settings={**RECIPES["jsma"].settings, "share": 1.0})

    crafted = craft(recipe, Rivals(), image, torch.tensor([2]), targets=torch.tensor([target]))

    assert (crafted.targets.tolist(), crafted.predicted.tolist()) == ([target], [target])


def test_torchattacks_gives_the_last_iterate_though_one_before_it_fooled_and_no_mask_of_success():
    network, images = Band(), grey(0.46, 0.46)
    ways = [torchattacks.BIM(network, eps=0.1, alpha=0.05, steps=steps)(images, ZEROS) for steps in (1, 2)]

    assert [network(made).argmax(dim=1).tolist() for made in ways] == [[1, 1], [0, 0]]
    assert isinstance(ways[1], torch.Tensor)


def test_the_best_iterate_is_given_with_a_mask_of_success():
    recipe = replace(RECIPES["bim"], budget=0.1, settings={**RECIPES["bim"].settings, "steps": 2, "step": 0.5})

    crafted = craft(recipe, Band(), grey(0.46, 0.3), ZEROS)

    assert crafted.fooled.tolist() == [True, False]


def test_torchattacks_fails_on_images_that_are_not_contiguous():
    images = torch.rand(2, 8, 8, 3).permute(0, 3, 1, 2)

    with pytest.raises(RuntimeError, match="view"):
        torchattacks.PGDL2(MeanBoundary(), eps=0.5)(images, ZEROS)


def test_images_that_are_not_contiguous_give_what_the_same_images_give_that_are():
    images = (torch.rand(2, 8, 8, 3) * 255).round().permute(0, 3, 1, 2) / 255

    one, other = (craft(RECIPES["pgd-l2"], MeanBoundary(), each, ZEROS) for each in (images, images.contiguous()))

    assert np.array_equal(one.pixels, other.pixels)


def test_torchattacks_leaves_the_network_in_another_mode_when_an_attack_fails():
    network = Breaking().train()

    with pytest.raises(RuntimeError, match="broken network"):
        torchattacks.PGD(network)(grey(0.4, 0.4), ZEROS)

    assert not network.training


def test_the_mode_is_restored_when_an_attack_fails():
    network = Breaking().train()

    with pytest.raises(RuntimeError, match="broken network"):
        craft(RECIPES["pgd"], network, grey(0.4, 0.4), ZEROS)

    assert network.training


def test_torchattacks_writes_its_whole_file_again_at_every_batch(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(torch, "save", lambda what, path: written.append(len(what["labels"])))
    loader = DataLoader(TensorDataset(grey(0.3, 0.4, 0.45), torch.zeros(3, dtype=torch.long)), batch_size=1)

    torchattacks.FGSM(MeanBoundary()).save(loader, save_path=str(tmp_path / "all.pt"), verbose=False)

    assert written == [1, 2, 3]


def test_a_store_leaves_the_shards_alone_that_it_has(tmp_path):
    crafted = craft(RECIPES["fgsm"], MeanBoundary(), grey(0.45, 0.49), ZEROS)

    def add(store, index):
        key, ids = ShardKey("test", "fgsm", index), np.arange(2) + 2 * index
        store.note(store.write(key, ids, np.zeros(2, np.int64), crafted, {"norm": "linf"}))

    def shards():
        return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in tmp_path.rglob("*.safetensors")}

    with AttackStore.writing(tmp_path, Origin("a" * 64, "grey", 0, 2)) as store:
        add(store, 0)
        before = shards()
        add(store, 1)

    assert len(before) == 1
    assert before.items() <= shards().items()
    assert len(shards()) == 2
