"""Weights that a user brings: a safetensors file into a backbone, or a message that says what does not fit."""

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from detector.errors import DataError
from detector.network.normalise import Normalise

_STATISTICS = {"normalise.mean", "normalise.std"}


def load_weights(
    network: nn.Module, file: Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> None:
    """Put the weights of `file` into `network`.

    Args:
        network: the backbone.
        file: safetensors; names may all begin with `module.`, as DataParallel writes them.
        mean: of the pixels in [0, 1] that the weights were trained with, one for each channel; for networks that
            normalise pixels themselves where the file does not say it.
        std: the standard deviations, likewise.

    Raises:
        DataError: the file cannot be read, or names or shapes do not fit; the message names them.
    """
    try:
        found = safetensors.torch.load_file(file)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"expected weights as safetensors in {file}, got: {reason}") from None
    broken = [name for name, value in found.items() if not value.isfinite().all()]
    if broken:
        raise DataError(f"expected finite weights in {file}, got others in {', '.join(broken[:5])}")
    if found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    if mean is not None and std is not None:
        normalise = getattr(network, "normalise", None)
        if not isinstance(normalise, Normalise):
            raise DataError(f"expected a network that normalises pixels itself, got {type(network).__name__}")
        channels = normalise.mean.numel()
        if len(mean) != channels or len(std) != channels:
            raise DataError(f"expected {channels} pixel means and deviations, got {len(mean)} and {len(std)}")
        normalise.set_statistics(torch.tensor(mean), torch.tensor(std))
        found = {name: value for name, value in found.items() if name not in _STATISTICS}
        found |= {name: value for name, value in network.state_dict().items() if name in _STATISTICS}
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unknown = [name for name in found if name not in wanted]
    other = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    if missing or unknown or other:
        faults = [
            _counted("missing", missing),
            _counted("unknown", unknown),
            _counted("of another shape", other),
        ]
        hint = "; pixel statistics can be given beside the file" if set(missing) == _STATISTICS else ""
        raise DataError(
            f"expected weights of {type(network).__name__} in {file}, got {', '.join(filter(None, faults))}{hint}"
        )
    network.load_state_dict(found, strict=False)


def _counted(what: str, names: Sequence[str], shown: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what} ({'; '.join(names[:shown])}{more})"
