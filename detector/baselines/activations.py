"""The activations that other detectors read: the mean of every channel, layer by layer, and the class logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from detector.baselines.torch_score import Trace
from detector.errors import RequestError
from detector.network.decouple import GatedNet
from detector.network.gates import logits_of
from detector.paths.encoder import Floats

HEAD = "head"
Rows = TypeVar("Rows", Tensor, Floats)


class ActivationReader:
    """Rows of pooled activations of one network: the inputs of its gated convolutions and of its last linear layer.

    Attributes:
        layers: name of the layer -> its channels, in network order; the last is `HEAD`.
        classes: of the network.
    """

    def __init__(self, network: GatedNet, example: Tensor) -> None:
        """A reader.

        Args:
            network: in evaluation mode.
            example: an image or more that it takes, `(batch, channels, height, width)`.

        Raises:
            RequestError: the network has no linear layer.
        """
        self._network = network
        modules = dict(network.named_modules())
        linear = [module for name, module in modules.items() if isinstance(module, nn.Linear) and "gates" not in name]
        if not linear:
            raise RequestError("expected a network that ends with a linear layer, got none")
        self._watched: dict[str, nn.Module] = {}
        for layer in network.layers:
            self._watched[layer] = next(module for name, module in modules.items() if name.endswith(f".{layer}"))
        self._watched[HEAD] = linear[-1]
        with torch.inference_mode():
            logits, _, parts = self._read(example[:1])
        self.classes = logits.shape[1]
        self.layers = {name: part.shape[1] for name, part in parts.items()}

    def rows(self, images: Tensor) -> Floats:
        """Class logits, then pooled activations of all layers, `float32`, `(batch, classes + channels)`."""
        with torch.inference_mode():
            rows: Floats = self.trace(images).rows.float().cpu().numpy()
        return rows

    def trace(self, images: Tensor) -> Trace:
        """The same rows, with a gradient where the images want one."""
        logits, gates, parts = self._read(images)
        return Trace(logits, gates, torch.cat([logits, *parts.values()], dim=1))

    def logits(self, rows: Rows) -> Rows:
        """The class logits among the columns of `rows`."""
        return rows[:, : self.classes]

    def activations(self, rows: Rows) -> Rows:
        """The pooled activations among the columns of `rows`, layers side by side."""
        return rows[:, self.classes :]

    def by_layer(self, rows: Rows) -> dict[str, Rows]:
        """The pooled activations of each layer, `(images, channels)`."""
        ends = np.cumsum([self.classes, *self.layers.values()]).tolist()
        return {name: rows[:, start:end] for name, start, end in zip(self.layers, ends, ends[1:], strict=False)}

    def _read(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Class logits, gate logits, and the activations of each layer."""
        seen: dict[str, Tensor] = {}
        with self._watching(seen):
            logits, readings = self._network.trace(images)
        return logits, logits_of(readings), seen

    @contextmanager
    def _watching(self, seen: dict[str, Tensor]) -> Iterator[None]:
        def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[name] = args[0].flatten(2).mean(dim=2) if args[0].ndim > 2 else args[0]

            return module.register_forward_pre_hook(note)

        handles = [watch(name, module) for name, module in self._watched.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
