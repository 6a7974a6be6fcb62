"""What a decoupled network is trained for; each term is a function of gate readings and can be switched off.

Source: Li et al., ECCV 2020, for `label_information`, `alignment` and `sparsity`. `input_information` follows the
paper's abstract rather than its code: information between a path and its *image*. `distillation` is Hinton et al. 2015.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.errors import RequestError
from detector.network.gates import GateReading, firing_probability

Readings = Mapping[str, GateReading]


@dataclass(frozen=True, slots=True)
class Objective:
    """Weights of the terms beside cross-entropy; 0 switches a term off.

    Attributes:
        label_information: λm, cross-entropy of a linear head on each layer's mask.
        input_information: weight of the mean information per filter between mask and image, in nats.
        redundancy: weight of the mean information that one filter's mask has about another's, in nats.
        alignment: λk, divergence between the filters' responses and their mask.
        sparsity: weight of the distance between the share of open filters and the target, or, where `counted` is
            set, λs of the paper: distances are numbers of filters and are summed over the layers.
        counted: see `sparsity`.
        distillation: weight of the backbone's own answer; cross-entropy gets one minus it.
        normalised: whether gate logits are batch-normalised.
        annealed: whether training noise falls to nothing; otherwise it is N(0, 1) throughout.
        zero_target: the sparsity target is 0 (a plain count penalty) whatever share is to be kept.
    """

    label_information: float = 0.0
    input_information: float = 0.0
    redundancy: float = 0.0
    alignment: float = 0.0
    sparsity: float = 0.0
    counted: bool = False
    distillation: float = 0.0
    normalised: bool = True
    annealed: bool = True
    zero_target: bool = False


OBJECTIVES: Mapping[str, Objective] = {
    "pathguard": Objective(input_information=0.5, sparsity=5.0, distillation=0.7),
    "li2020": Objective(
        label_information=0.01,
        alignment=1.0,
        sparsity=1.5e-4,
        counted=True,
        normalised=False,
        annealed=False,
        zero_target=True,
    ),
}


def objective_named(name: str) -> Objective:
    """The objective of that name.

    Raises:
        RequestError: the name is unknown.
    """
    if name not in OBJECTIVES:
        raise RequestError(f"expected an objective of {', '.join(OBJECTIVES)}; got {name!r}")
    return OBJECTIVES[name]


class LabelHeads(nn.Module):
    """One linear head without bias per gated layer: mask -> logits of the classes (used in training only)."""

    def __init__(self, layers: Mapping[str, int], classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes, bias=False) for width in layers.values())

    def forward(self, readings: Readings) -> list[Tensor]:
        """Readings -> class logits of each layer, `(batch, classes)`."""
        return [head(reading.mask) for head, reading in zip(self.heads, readings.values(), strict=True)]


def label_information(head_logits: list[Tensor], labels: Tensor) -> Tensor:
    """Σ_l CE(A_l z_l, y), a scalar; H(y) - CE bounds I(z_l; y) from below (Barber and Agakov 2003)."""
    return torch.stack([F.cross_entropy(logits, labels) for logits in head_logits]).sum()


def input_information(readings: Readings, noise: float = 1.0) -> Tensor:
    """Mean over filters of I(z_j; x) = H(mean p) - mean H(p) in nats, a scalar in [0, ln 2].

    p is each filter's firing probability under training noise. The sum over filters bounds the information of the
    whole path from above only, since filters may copy each other.
    """
    p = torch.cat([firing_probability(reading.logits, noise) for reading in readings.values()], dim=1)
    return (_binary_entropy(p.mean(dim=0)) - _binary_entropy(p).mean(dim=0)).mean()


def redundancy(readings: Readings, noise: float = 1.0) -> Tensor:
    """Mean information in nats that one filter's mask has about another filter's of its layer, a scalar in [0, ln 2].

    In each layer the filters stand in a chain, in an order drawn anew at each call, and each is compared with the one
    before it. What is left of the sum of `input_information` without the sum over the chain still bounds the
    information between path and image from above, and tighter: H(z) <= H(z_1) + Σ H(z_k | z_(k-1)) (Chow and Liu
    1968). Given the image, masks are independent, so that P(both open) is the mean over images of p_j p_k.
    """
    pairs = []
    for reading in readings.values():
        p = firing_probability(reading.logits, noise)
        if p.shape[1] > 1:
            chain = torch.randperm(p.shape[1], device=p.device)
            pairs.append(_information_of_pairs(p[:, chain[1:]], p[:, chain[:-1]]))
    return torch.cat(pairs).mean() if pairs else torch.zeros(())


def alignment(readings: Readings) -> Tensor:
    """Σ_l KL(softmax(GAP(Y_l)) || softmax(z_l)) / C_l, batch mean, a scalar; gradients reach both sides.

    Raises:
        RequestError: the readings were not taken in training, so that they hold no responses.
    """
    terms = []
    for reading in readings.values():
        if reading.response is None:
            raise RequestError("expected readings of a network in training mode, got readings without responses")
        wanted = F.log_softmax(reading.response.float(), dim=1)
        given = F.log_softmax(reading.mask.float(), dim=1)
        terms.append(F.kl_div(given, wanted, reduction="batchmean", log_target=True) / reading.mask.shape[1])
    return torch.stack(terms).sum()


def sparsity_counted(readings: Readings, target: float) -> Tensor:
    """Σ_l | mean_b |z_l|_1 - target C_l |: open filters too many or too few in each layer, summed, a scalar."""
    distances = [(r.mask.sum(dim=1).mean() - target * r.mask.shape[1]).abs() for r in readings.values()]
    return torch.stack(distances).sum()


def sparsity_share(readings: Readings, target: float) -> Tensor:
    """| open share of all filters - target |, a scalar in [0, 1]; layers may differ."""
    return (torch.cat([r.mask for r in readings.values()], dim=1).mean() - target).abs()


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """KL(teacher || network) at `temperature`, times its square, batch mean, a scalar."""
    wanted = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    given = F.log_softmax(logits.float() / temperature, dim=1)
    return F.kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2


def _information_of_pairs(one: Tensor, other: Tensor) -> Tensor:
    """I(a; b) in nats for columns of firing probabilities of filters independent given the image, `(filters,)`."""
    both, of_one, of_other = (one * other).mean(dim=0), one.mean(dim=0), other.mean(dim=0)
    joint = torch.stack([both, of_one - both, of_other - both, 1 - of_one - of_other + both]).clamp_min(1e-9)
    entropy_of_both = -(joint * joint.log()).sum(dim=0)
    return _binary_entropy(of_one) + _binary_entropy(of_other) - entropy_of_both


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
