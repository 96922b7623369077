"""SqueezeNet 1.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.build import PositiveFloat, PositiveInt, Range
from hybridfl.errors import ConfigError
from hybridfl.models.norm import Norm, norm_layer
from hybridfl.models.width import scaled

FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
"""Channels of the squeeze convolution, and of each of the two expand convolutions, of every fire module."""
POOLED_BEFORE = (0, 2, 4)
"""Fire modules with max pooling before them."""
LEAST_SIDE = 8
"""Pixels a side after the first convolution that three poolings leave one of."""


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 (Iandola et al. 2016, arXiv 1602.07360, and the authors' later release 1.1).

    The modules are called as torchvision's, so that files of its body fit. The paper ends in a 1 × 1 convolution, ReLU and
    the mean over the pixels; here the mean comes first and the head is linear.

    Args:
        input_shape: ``(channels, height, width)``.
        classes: number of logits.
        stride: of the first convolution; 2 in the paper, 1 keeps more of small images.
        norm: layer after each convolution; the paper has none.
        groups: of every GroupNorm; must divide the channels.
        dropout: share of the pooled features set to 0 in training; 0.5 in the paper.
        width: factor on all channels, see :mod:`hybridfl.models.width`.
    """

    key_map: ClassVar[Mapping[str, str]] = {"classifier": "head"}
    """torchvision's name of what this net has its head for, see :mod:`hybridfl.models.files`."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        stride: PositiveInt = 2,
        norm: Literal["none"] | Norm = "none",
        groups: PositiveInt = 16,
        dropout: Annotated[float, Range(low=0, below=1)] = 0.0,
        width: PositiveFloat = 1.0,
    ) -> None:
        super().__init__()
        _check_size(input_shape, stride)
        size = [(side - 3) // stride + 1 for side in input_shape[1:]]

        def norm_of(channels: int) -> nn.Module:
            pixels = size[0] * size[1]
            return nn.Identity() if norm == "none" else norm_layer(norm, channels, groups, width, pixels)

        stem = nn.Conv2d(input_shape[0], scaled(64, width), 3, stride)
        layers: list[nn.Module] = [stem, nn.Sequential(norm_of(64), nn.ReLU())]
        inputs = stem.out_channels
        for place, (squeeze, expand) in enumerate(FIRES):
            if place in POOLED_BEFORE:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
                size = [side // 2 for side in size]
            narrow, wide = scaled(squeeze, width), scaled(expand, width)
            layers.append(Fire(inputs, narrow, wide, norm_of(squeeze), norm_of(expand), norm_of(expand)))
            inputs = 2 * wide
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # they all have one

    def forward(self, x: Tensor) -> Tensor:
        """``(b, channels, height, width)`` → logits ``(b, classes)``."""
        logits: Tensor = self.head(self.dropout(self.features(x).mean((2, 3))))
        return logits


class Fire(nn.Module):
    """A 1 × 1 convolution to few channels, then 1 × 1 and 3 × 3 convolutions beside each other."""

    def __init__(
        self,
        inputs: int,
        squeeze: int,
        expand: int,
        squeeze_norm: nn.Module,
        expand1x1_norm: nn.Module,
        expand3x3_norm: nn.Module,
    ) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.squeeze_norm = squeeze_norm
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand1x1_norm = expand1x1_norm
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.expand3x3_norm = expand3x3_norm

    def forward(self, x: Tensor) -> Tensor:
        """``(b, inputs, h, w)`` → ``(b, 2 · expand, h, w)``."""
        x = F.relu(self.squeeze_norm(self.squeeze(x)))
        sides = self.expand1x1_norm(self.expand1x1(x)), self.expand3x3_norm(self.expand3x3(x))
        return F.relu(torch.cat(sides, 1))


def _check_size(input_shape: tuple[int, ...], stride: int) -> None:
    side = min(input_shape[1:])
    largest = (side - 3) // (LEAST_SIDE - 1)
    if stride <= largest:
        return
    needed = f"images of {side} pixels a side are pooled away; at least {3 + (LEAST_SIDE - 1) * stride} are needed"
    if largest >= 1:
        raise ConfigError("stride", f"got {stride}: {needed}; nearest valid value: {largest}.")
    raise ConfigError("", f"{needed}, or {3 + LEAST_SIDE - 1} with stride=1; nearest valid choice: model=cnn.")
