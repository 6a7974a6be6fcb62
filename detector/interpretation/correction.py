"""What an attacked image would be called if it took a usual path.

The predicted label is wrong, so it is not known whose usual path to open. That of the predicted class and that of the
second likeliest are forced open for the image, one after the other; the second class is taken where it is likelier than
the first on both paths together, by a lead that is large for an image that is barely flagged, and that the first class
may have where it is flagged beyond doubt.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detector.batches import device_of
from detector.interpretation.census import Doubles
from detector.interpretation.forced_path import forced_path
from detector.interpretation.usual_paths import UsualPaths
from detector.network.decouple import GatedNet
from detector.paths.encoder import Floats

# The p-value at which the second class must be as likely as the first, and by how many nats likelier it must be for
# each power of ten above it (less, for each below). Chosen on the clean images of the split calibration and on C&W and
# DeepFool of the split fitting: one lead for all p-values changes more clean labels for as many restored ones.
EVEN_P_VALUE, NATS_PER_DECADE = 0.009, 5.0


class Corrector:
    """Usual paths of a network, ready to be forced open."""

    def __init__(self, network: GatedNet, usual: UsualPaths) -> None:
        """Keeps both.

        Args:
            network: in evaluation mode; no other thread may run it while `restored` does.
            usual: statistics of its paths.
        """
        self._network = network
        self._states = torch.from_numpy(usual.usual().astype(np.float32))

    def restored(self, images: Tensor, class_logits: Floats, p_values: Doubles) -> npt.NDArray[np.int64]:
        """The class of each image on usual paths, the likeliest or the second likeliest, `(images,)`.

        Args:
            images: in [0, 1], `(images, channels, height, width)`.
            class_logits: what the network says of them, or their logarithm or softmax, `(images, classes)`.
            p_values: that each image is clean, in (0, 1], `(images,)`.
        """
        if not len(images):
            return np.empty(0, np.int64)
        tried = torch.from_numpy(np.argsort(-class_logits, axis=1, kind="stable")[:, :2].copy())
        states = self._states[tried.flatten()].to(device_of(self._network))
        with torch.inference_mode(), forced_path(self._network, states):
            logits = self._network(images.repeat_interleave(2, dim=0)).cpu()
        on_both = logits.log_softmax(dim=1).view(len(images), 2, -1).mean(dim=1).gather(1, tried)
        leads = NATS_PER_DECADE * np.log10(p_values / EVEN_P_VALUE)
        second = on_both[:, 1] - on_both[:, 0] > torch.from_numpy(leads)
        return np.asarray(torch.where(second, tried[:, 1], tried[:, 0]).numpy(), np.int64)
