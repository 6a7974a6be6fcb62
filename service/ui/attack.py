"""Two well-known attacks for the page's button, on the network's own gradient: to see how a path bends, not to judge.

The attacks that judge a detector are in the package `attacks`, which a server does without. Sources: Goodfellow et al.,
"Explaining and Harnessing Adversarial Examples", 2015 (FGSM); Madry et al., "Towards Deep Learning Models Resistant to
Adversarial Attacks", 2018 (PGD).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from detector.batches import device_of, to_pixels, to_tensor
from detector.images import Pixels

# Method -> steps; a step is the budget or, of several, a quarter of it.
METHODS = {"fgsm": 1, "pgd": 10}
MAX_LEVELS = 32


def attacked(network: nn.Module, pixels: Pixels, method: str, levels: float) -> Pixels:
    """The image moved away from its predicted label.

    Args:
        network: images in [0, 1] to logits, in evaluation mode.
        pixels: `uint8`, `(height, width, channels)`.
        method: `fgsm` or `pgd`.
        levels: most that a pixel may change, in grey levels of 255.
    """
    budget, steps = levels / 255, METHODS[method]
    clean = to_tensor(pixels[None], device_of(network))
    with torch.no_grad():
        label = network(clean).argmax(dim=1)
    moved = clean
    for _ in range(steps):
        asked = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(network(asked), label), [asked])
        with torch.no_grad():
            moved = moved + slope.sign() * (budget if steps == 1 else budget / 4)
            moved = clean + (moved - clean).clamp(-budget, budget)
            moved = moved.clamp(0, 1)
    (pixels,) = to_pixels(moved)
    return np.asarray(pixels, np.uint8)
