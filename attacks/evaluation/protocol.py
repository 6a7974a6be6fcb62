"""How much of everything an evaluation looks at: a few minutes of it, or all."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attacks.recipes import Setting
from detector.errors import RequestError


@dataclass(frozen=True, slots=True)
class Trial:
    """How long attackers search who know a detector.

    Attributes:
        images: test images that they are given.
        steps: of each descent.
        restarts: descents from different starts.
        recipes: which attacks, each with the settings that are not its own: of those that do not descend.
        budgets: L-inf, in grey levels of 255; the last is the headline.
    """

    images: int
    steps: int
    restarts: int
    recipes: Mapping[str, Mapping[str, Setting]]
    budgets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Protocol:
    """Limits of an evaluation.

    Attributes:
        name: what `--protocol` calls it.
        fitting_images: clean images, and images of each attack, that are fitted on.
        attacked_images: test images of each attack, of those that it fooled the network with.
        clean_images: clean images of calibration and test split; None for all.
        costly_images: at most so many of each kind for baselines that take long for each image.
        matrix: attacks in the train x test matrix.
        corrupted_images: test images that each corruption is put on.
        severities: of the corruptions, from 1 to 5.
        foreign_images: images of another data set.
        adaptive: attackers who know our detector.
        adaptive_baselines: attackers who know a baseline, and those of ours that it is held against.
        adaptive_costly: the same of baselines that take long for each image.
        bootstrap: draws of an interval.
        baselines: whether other authors' detectors are run as well; the costly ones of them too.
        costly_baselines: whether those that take long for each image are among them.
        shots: images of each class that the detector is fitted on, in the table of small fitting sets.
        timed_seconds: how long costs are measured for each batch size.
    """

    name: str
    fitting_images: int
    attacked_images: int
    clean_images: int | None
    costly_images: int
    matrix: int
    corrupted_images: int
    severities: tuple[int, ...]
    foreign_images: int
    adaptive: Trial
    adaptive_baselines: Trial
    adaptive_costly: Trial
    bootstrap: int
    baselines: bool
    costly_baselines: bool
    shots: tuple[int, ...]
    timed_seconds: float


_QUICK: Mapping[str, Mapping[str, Setting]] = {"adaptive-orthogonal": {}, "adaptive-joint": {}}
_DESCENTS: Mapping[str, Mapping[str, Setting]] = {
    "adaptive-joint": {}, "adaptive-selective": {}, "adaptive-orthogonal": {}, "adaptive-path": {},
}  # fmt: skip

QUICK = Protocol(
    "quick", 400, 200, 1000, 0, 5, 60, (1, 3), 300,
    Trial(24, 30, 1, _QUICK, (2, 8)), Trial(12, 30, 1, _QUICK, (8,)), Trial(6, 30, 1, _QUICK, (8,)),
    100, True, False, (1, 10), 1.0,
)  # fmt: skip
FULL = Protocol(
    "full", 4000, 3000, None, 500, 12, 500, (1, 3, 5), 1500,
    Trial(200, 200, 5, {**_DESCENTS, "adaptive-square": {}, "adaptive-hopskipjump": {}}, (1, 2, 4, 8)),
    Trial(50, 200, 2, {**_DESCENTS, "adaptive-square": {"queries": 2000},
                       "adaptive-hopskipjump": {"steps": 10, "restarts": 1}}, (8,)),
    Trial(20, 50, 1, {**_DESCENTS, "adaptive-square": {"queries": 500}}, (8,)),
    1000, True, True, (1, 5, 10), 5.0,
)  # fmt: skip
# For networks that take several times as long for an image: less of what is repeated for each of them.
LARGER = replace(
    FULL, name="larger", costly_images=200, matrix=6, corrupted_images=200, severities=(1, 3), shots=(1, 10),
    adaptive=Trial(50, 100, 2, FULL.adaptive_baselines.recipes, (2, 8)), adaptive_baselines=FULL.adaptive_costly,
    adaptive_costly=replace(FULL.adaptive_costly, images=10),
)  # fmt: skip
# For networks that withstand attackers, so that these take all their steps: no other detectors.
HARDENED = replace(FULL, name="hardened", baselines=False)
# The longest search, by every descent, and little else.
INSISTENT = replace(
    QUICK, name="insistent", matrix=2, corrupted_images=10, severities=(1,), baselines=False, shots=(),
    adaptive=Trial(50, 1000, 10, _DESCENTS, (8,)),
)  # fmt: skip
PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in (QUICK, FULL, LARGER, HARDENED, INSISTENT)}


def protocol_named(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in PROTOCOLS:
        raise RequestError(f"expected a protocol of {', '.join(PROTOCOLS)}; got {name!r}")
    return PROTOCOLS[name]
