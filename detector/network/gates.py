"""The architecture controlling module: chooses, for each image, which filters of one convolution may fire.

Source: Li et al., "Interpretable Neural Network Decoupling", ECCV 2020. Two things differ from the paper's module and
can be switched back: the logits are batch-normalised, so that every gate depends on its input from the first step
(without it nearly all gates become constants), and the offset is set for the share of filters that is to stay open.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class GateReading:
    """What one gate said about a batch.

    Attributes:
        logits: gate logits `u`, `(batch, channels)`; a filter is open where its logit is above zero.
        mask: architecture encoding `z`, `(batch, channels)`: 0 or 1, or between the two for some images in training.
            Its gradient is the straight-through one, unless the gate is frozen.
        response: global average of the filters' output before gating, `(batch, channels)`; None outside training.
        inputs: what the gate read, the mean of each channel of the convolution's input, `(batch, in_channels)`; None
            of a mask that reads nothing.
    """

    logits: Tensor
    mask: Tensor
    response: Tensor | None = None
    inputs: Tensor | None = None


def saturating_sigmoid(logits: Tensor) -> Tensor:
    """`clip(1.2 sigmoid(logits) - 0.1, 0, 1)`, the soft mask of Improved SemHash (Kaiser and Bengio 2018)."""
    return (1.2 * torch.sigmoid(logits) - 0.1).clamp(0.0, 1.0)


def round_straight_through(logits: Tensor, soft: Tensor) -> Tensor:
    """1 where a logit is above zero, else 0, with the gradient of `soft`."""
    hard = (logits > 0).to(soft.dtype)
    return hard + (soft - soft.detach())


class ChannelGate(nn.Module):
    """Opens and closes the filters of one convolution, for each image anew.

    `u = γ BN(W2 ReLU(W1 s + b1)) + β` with `s` the global average of the convolution's input. At test time the mask
    is `1[u > 0]`; in training Gaussian noise is added and a fair coin per image chooses the soft or the hard mask. With
    no noise left, training uses the mask of test time.
    """

    def __init__(self, in_channels: int, out_channels: int, keep: float = 0.7, normalised: bool = True) -> None:
        """A gate before a convolution of `in_channels` to `out_channels`.

        Args:
            in_channels: channels of the convolution's input.
            out_channels: filters of the convolution.
            keep: share of filters open at the start, in (0, 1); only for normalised gates.
            normalised: False for the paper's own gate, `u = W2 ReLU(W1 s + b1) + b2` with biases of 1.
        """
        super().__init__()
        hidden = max(1, in_channels // 4)
        self.squeeze = nn.Linear(in_channels, hidden)
        self.excite = nn.Linear(hidden, out_channels, bias=not normalised)
        self.normalise: nn.Module = nn.BatchNorm1d(out_channels) if normalised else nn.Identity()
        nn.init.ones_(self.squeeze.bias)
        if isinstance(self.normalise, nn.BatchNorm1d):
            nn.init.constant_(self.normalise.bias, offset_for(keep))
        else:
            nn.init.ones_(self.excite.bias)
        self.noise = 1.0
        self.frozen = False

    def read(self, features: Tensor) -> GateReading:
        """`(batch, in_channels, height, width)` -> reading of `(batch, out_channels)`."""
        pooled = features.mean(dim=(2, 3))
        logits = self.normalise(self.excite(torch.relu(self.squeeze(pooled))))
        if self.training:
            return GateReading(logits, self._noisy_mask(logits), inputs=pooled)
        if self.frozen or not logits.requires_grad:
            return GateReading(logits, (logits > 0).to(logits.dtype), inputs=pooled)
        return GateReading(logits, round_straight_through(logits, saturating_sigmoid(logits)), inputs=pooled)

    def forward(self, features: Tensor, output: Tensor) -> tuple[Tensor, GateReading]:
        """Gate `output` by what `features` say.

        Args:
            features: input of the convolution, `(batch, in_channels, height, width)`.
            output: its normalised (and activated) output, `(batch, out_channels, height', width')`.

        Returns:
            `output` with the closed filters exactly zero, and the reading.
        """
        reading = self.read(features)
        mask = reading.mask.to(output.dtype)[:, :, None, None]
        if self.training:
            reading = replace(reading, response=output.mean(dim=(2, 3)))
        # Nothing else reads the output (see `decouple`), so that without gradients it can be masked where it lies.
        return (output * mask if torch.is_grad_enabled() else output.mul_(mask)), reading

    def _noisy_mask(self, logits: Tensor) -> Tensor:
        if self.noise == 0:  # the end of an annealed training: the mask of test time
            return round_straight_through(logits, saturating_sigmoid(logits))
        noisy = logits + self.noise * torch.randn_like(logits)
        soft = saturating_sigmoid(noisy)
        takes_hard = torch.rand(len(logits), 1, device=logits.device) < 0.5
        return torch.where(takes_hard, round_straight_through(noisy, soft), soft)


def logits_of(readings: Mapping[str, GateReading]) -> Tensor:
    """The gate logits of all gates side by side, `(batch, total channels)`."""
    return torch.cat([reading.logits for reading in readings.values()], dim=1)


def inputs_of(readings: Mapping[str, GateReading]) -> Tensor:
    """What all gates read, side by side, `(batch, total channels read)`."""
    read = [reading.inputs for reading in readings.values() if reading.inputs is not None]
    return torch.cat(read, dim=1) if read else logits_of(readings)[:, :0]


def offset_for(keep: float) -> float:
    """The mean logit at which a share `keep` of standard normal logits is above zero."""
    return NormalDist().inv_cdf(min(max(keep, 1e-3), 1 - 1e-3))


def firing_probability(logits: Tensor, noise: float = 1.0) -> Tensor:
    """P(z = 1) of each filter under Gaussian training noise of standard deviation `noise`, the shape of `logits`."""
    return 0.5 * (1.0 + torch.erf(logits.float() / (noise * math.sqrt(2.0))))
