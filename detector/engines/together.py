"""Which steps of the compiled kernel the images of a batch take together, found by measuring.

Image by image, what an image leaves stays in the cache for its next step, and the weights are read again for each of
them. Taken together, a step's weights are read once for all images of a group, and their maps lie apart. Each image
computes its own open filters from its own open channels in both cases, and says the same.
"""

import numpy as np

from detector.engines.kernel import GROUP, KernelEngine
from detector.images import Pixels

# A step is taken together where that saves this share of the whole time, which a clock can still tell.
_WORTH = 0.005
_MILLISECONDS = 300.0  # for a group; where it takes longer, two images show what can be saved


def choose_together(engine: KernelEngine, images: Pixels) -> None:
    """Have `engine` take together what is faster so, if all of it is faster then.

    Args:
        engine: takes no steps together yet.
        images: as many as a group, `(images, height, width, channels)`.
    """
    one = float(engine.step_milliseconds(images[:1], [()], 1).sum())
    images = images[: GROUP if GROUP * one < _MILLISECONDS else 2]
    alone, together = engine.step_milliseconds(images, [(), range(len(engine.program.steps))])
    chosen = np.flatnonzero(alone - together > _WORTH * alone.sum()).tolist()
    if chosen:
        before, after = engine.step_milliseconds(images, [(), chosen]).sum(axis=1)
        if after < before:
            engine.take_together(chosen)


def report(engine: KernelEngine) -> str:
    """What was chosen, for a log."""
    steps = len(engine.program.steps)
    if not engine.together:
        return f"engine {engine.name}: the images of a batch take all {steps} steps one by one"
    numbers = ", ".join(str(1 + number) for number in engine.together)
    return f"engine {engine.name}: of {steps} steps, up to {GROUP} images of a batch take these together: {numbers}"
