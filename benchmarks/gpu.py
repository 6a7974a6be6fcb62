"""The same on an NVIDIA GPU, for benchmarks.speed: plain network and ours, batch 1 and more, in absolute times too.

The plain side takes a tensor that lies on the GPU and gives logits on the host, in torch eager and by torch.compile
with its CUDA graphs; ours takes 8-bit pixels on the host and gives verdicts there. All compute in full float32.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.plain import COMPILED, EAGER, forward
from benchmarks.report import Row
from benchmarks.timing import interleaved
from detector.batches import to_tensor
from detector.images import Pixels

PLAIN = (EAGER, COMPILED)
# As served, by the engine `cuda`, and masked in torch eager.
SERVED, FUSED, MASKED = "ours", "ours, cuda", "ours, masked"
REPETITIONS = 200


def measure(
    backbone: nn.Module, ours: Mapping[str, Callable[[Pixels], object]], pixels: Pixels, device: torch.device
) -> dict[str, float]:
    """Side -> median seconds for one batch.

    Args:
        backbone: the plain network.
        ours: side -> verdicts of a batch.
        pixels: the batch.
        device: where the plain network runs.
    """
    images, eager = to_tensor(pixels, device), copy.deepcopy(backbone).to(device)
    sides: dict[str, Callable[[], object]] = {side: partial(answer, pixels) for side, answer in ours.items()}
    sides[EAGER] = partial(_logits, eager, images)
    # Its recordings belong to this thread and to images of this size: one for each batch.
    sides[COMPILED] = partial(
        _logits, torch.compile(copy.deepcopy(eager), mode="reduce-overhead", dynamic=False), images
    )
    return dict(zip(sides, interleaved(list(sides.values()), REPETITIONS, warm_up=10), strict=True))


def _logits(network: Callable[[Tensor], object], images: Tensor) -> Tensor:
    logits = forward(network, images)
    assert isinstance(logits, Tensor)
    return logits.cpu()  # waits for the device, as an answer does


def rows(name: str, measured: Mapping[str, Mapping[str, float]] | None, batches: tuple[int, ...]) -> Iterator[Row]:
    """Of one network; without values where no GPU was there.

    Args:
        name: of the network.
        measured: images, as text -> side -> seconds; None where nothing was measured.
        batches: numbers of images.
    """
    for batch in batches:
        times = {} if measured is None else measured[str(batch)]
        plain = min(times[side] for side in PLAIN) if times else None
        yield Row(
            figure=f"{name}, GPU, batch {batch}: label + verdict / plain, best engine of each",
            value=None if plain is None else times[SERVED] / plain,
        )
        yield Row(
            figure=f"{name}, GPU, batch {batch}: the same, both in torch eager",
            value=None if plain is None else times[MASKED] / times[EAGER],
        )
        for side in (SERVED, FUSED, MASKED, *PLAIN):
            seconds = times.get(side)
            yield Row(
                figure=f"{name}, GPU, batch {batch}: {side}, ms", value=None if seconds is None else 1000 * seconds
            )
