"""What a training run needs to go on: weights, momenta and the epoch, in one safetensors file, whole or absent."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from detector.errors import TrainingError
from detector.files import write_whole

FILE = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best epoch so far.

    Attributes:
        score: what it reached on the validation images.
        weights: the network's, by name.
    """

    score: float
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training run between two epochs.

    Attributes:
        epoch: finished epochs.
        run: what makes the run this one (network, data, seed, schedule), JSON values.
        tensors: weights as `weights.NAME`, momenta as `momentum.NAME`.
        chosen: the best epoch so far; None before the first that may be chosen.
    """

    epoch: int
    run: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    chosen: Chosen | None


def save_checkpoint(
    folder: Path,
    epoch: int,
    run: Mapping[str, object],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    chosen: Chosen | None,
) -> None:
    """Write the checkpoint of `folder`; an interruption at any moment leaves the old one or the new one."""
    tensors = {f"weights.{name}": value.detach().clone() for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum.contiguous()
    metadata = {"epoch": str(epoch), "run": json.dumps(run, sort_keys=True)}
    if chosen is not None:
        # Cloned: safetensors refuses tensors that share memory, as the best and the latest weights may.
        tensors |= {f"chosen.{name}": value.clone() for name, value in chosen.weights.items()}
        metadata["score"] = repr(chosen.score)
    write_whole(folder / FILE, save(tensors, metadata))


def load_checkpoint(folder: Path, run: Mapping[str, object]) -> Checkpoint | None:
    """The checkpoint of `folder`, or None where there is none.

    Raises:
        TrainingError: it is damaged or of another run; the message names what differs.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise TrainingError(f"expected a whole checkpoint in {path}, got a damaged one ({error})") from None
    found = json.loads(metadata["run"])
    expected = json.loads(json.dumps(run))
    for key, wanted, got in _differences(expected, found):
        raise TrainingError(
            f"expected a checkpoint of {key} {wanted}, got one of {key} {got} in {path}; give another --out or "
            "remove it"
        )
    chosen = None
    if "score" in metadata:
        chosen = Chosen(float(metadata["score"]), _with_prefix(tensors, "chosen."))
    return Checkpoint(int(metadata["epoch"]), found, tensors, chosen)


def restore(checkpoint: Checkpoint, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and momenta back.

    Raises:
        TrainingError: the checkpoint is of a network of other layers.
    """
    try:
        network.load_state_dict(_with_prefix(checkpoint.tensors, "weights."))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"expected a checkpoint of this network, got one of other layers ({reason}); give another --out or "
            "remove it"
        ) from None
    for name, parameter in network.named_parameters():
        momentum = checkpoint.tensors.get(f"momentum.{name}")
        if momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)


def _differences(
    expected: Mapping[str, object], found: Mapping[str, object], inside: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Name, expected and found value of what differs, in the order of the names, nested values by their own."""
    for key in sorted({*found, *expected}):
        wanted, got = expected.get(key), found.get(key)
        if isinstance(wanted, Mapping) and isinstance(got, Mapping):
            yield from _differences(wanted, got, f"{key}.")
        elif wanted != got:
            yield f"{inside}{key}", wanted, got


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
