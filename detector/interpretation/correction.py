"""What an attacked image would be called if it took a usual path.

The predicted label is wrong, so it is not known whose usual path to open. Each of the classes that the network finds
likeliest is tried: its usual path is forced open for the image, and the class is kept that the network then finds
likeliest on its own usual path.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detector.batches import device_of
from detector.interpretation.forced_path import forced_path
from detector.interpretation.usual_paths import UsualPaths
from detector.network.decouple import GatedNet
from detector.paths.encoder import Floats

# Chosen on validation images and on attacks of the fitting split.
CANDIDATES = 3


class Corrector:
    """Usual paths of a network, ready to be forced open."""

    def __init__(self, network: GatedNet, usual: UsualPaths, candidates: int = CANDIDATES) -> None:
        """Keeps both.

        Args:
            network: in evaluation mode; no other thread may run it while `restored` does.
            usual: statistics of its paths.
            candidates: classes tried for each image: the likeliest ones.
        """
        self._network = network
        self._candidates = min(candidates, len(usual.census.images))
        self._states = torch.from_numpy(usual.usual().astype(np.float32))

    def restored(self, images: Tensor, class_logits: Floats) -> npt.NDArray[np.int64]:
        """The class of each image that is most at home on its own usual path, `(images,)`.

        Args:
            images: in [0, 1], `(images, channels, height, width)`.
            class_logits: what the network says of them, `(images, classes)`.
        """
        if not len(images):
            return np.empty(0, np.int64)
        likeliest = np.argsort(-class_logits, axis=1, kind="stable")[:, : self._candidates]
        tried = torch.from_numpy(likeliest)
        states = self._states[tried.flatten()].to(device_of(self._network))
        with torch.inference_mode(), forced_path(self._network, states):
            logits = self._network(images.repeat_interleave(self._candidates, dim=0)).cpu()
        own = logits.log_softmax(dim=1).gather(1, tried.flatten()[:, None]).view(len(images), self._candidates)
        best: Tensor = tried.gather(1, own.argmax(dim=1, keepdim=True))[:, 0]
        return np.asarray(best.numpy(), np.int64)
