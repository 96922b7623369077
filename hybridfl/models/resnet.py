"""Residual nets of two-convolution blocks, ResNet-20 and ResNet-18 among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.build import PositiveFloat, PositiveInt
from hybridfl.errors import ConfigError
from hybridfl.models.norm import Norm, norm_layer
from hybridfl.models.width import scaled

NormOf = Callable[[int, int], nn.Module]
"""A normalisation layer for so many channels (at width 1) of maps of so many pixels."""


class ResNet(nn.Module):
    """ResNet (He, Zhang, Ren, Sun 2016, arXiv 1512.03385): a stem, stages of residual blocks, mean pooling, the head.

    Every stage but the first halves the maps. ResNet-20 for images of 32 pixels is 3 stages of 16, 32, 64 channels with 3
    blocks each, shortcut A and the small stem (section 4.2); ResNet-18 for ImageNet is 4 stages of 64 to 512 channels
    with 2 blocks each, shortcut B and the stem ``imagenet`` (table 1). The paper's norm is ``batch``. GroupNorm keeps no
    running statistics, so that models of clients with different classes can be averaged (Hsieh et al. 2020,
    arXiv 1910.00189).

    Args:
        input_shape: ``(channels, height, width)``.
        classes: number of logits.
        channels: of each stage.
        blocks: of each stage.
        stem: ``cifar``, a 3 × 3 convolution; ``imagenet``, a 7 × 7 convolution and max pooling, a quarter of each side.
        norm: GroupNorm or BatchNorm after each convolution.
        groups: of every GroupNorm; must divide the channels.
        shortcut: where a block changes the number of channels, ``A`` takes every second pixel and adds channels of
            zeros, half of them before and half after, without parameters; ``B`` is a 1 × 1 convolution and a norm.
        width: factor on ``channels``, see :mod:`hybridfl.models.width`.
    """

    key_map: ClassVar[Mapping[str, str]] = {
        "module": "",  # of nn.DataParallel
        "bn1": "norm1",
        "bn2": "norm2",
        "downsample": "shortcut",
        "linear": "head",
        "fc": "head",
        **{f"layer{stage + 1}": f"stages.{stage}" for stage in range(4)},
    }
    """Names in the usual files of weights (torchvision's and those of CIFAR), see :mod:`hybridfl.models.files`."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        channels: tuple[PositiveInt, ...] = (16, 32, 64),
        blocks: tuple[PositiveInt, ...] = (3, 3, 3),
        stem: Literal["cifar", "imagenet"] = "cifar",
        norm: Norm = "group",
        groups: PositiveInt = 4,
        shortcut: Literal["A", "B"] = "A",
        width: PositiveFloat = 1.0,
    ) -> None:
        super().__init__()
        if not channels:
            raise ConfigError("channels", "got []: expected those of one stage or more, such as [16, 32, 64].")
        if len(blocks) != len(channels):
            problem = f"got {list(blocks)}: expected one number for each of the {len(channels)} stages of channels."
            raise ConfigError("blocks", problem)
        if shortcut == "A" and list(channels) != sorted(channels):
            problem = f"got A, which cannot take channels away as {list(channels)} would; nearest valid value: B."
            raise ConfigError("shortcut", problem)

        def norm_of(number: int, pixels: int) -> nn.Module:
            return norm_layer(norm, number, groups, width, pixels)

        size = input_shape[1:]
        if stem == "cifar":
            self.conv1 = _convolution(input_shape[0], scaled(channels[0], width), 3, 1)
            self.norm1 = norm_of(channels[0], math.prod(size))
            self.pool: nn.Module = nn.Identity()
        else:
            size = _halved(size)
            self.conv1 = _convolution(input_shape[0], scaled(channels[0], width), 7, 2)
            self.norm1 = norm_of(channels[0], math.prod(size))
            size = _halved(size)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Module] = []
        inputs = channels[0]
        for outputs, number in zip(channels, blocks, strict=True):
            stride = 2 if stages else 1
            size = _halved(size) if stages else size
            rest = width, shortcut, norm_of, math.prod(size)
            first = Block(inputs, outputs, stride, *rest)
            stages.append(nn.Sequential(first, *(Block(outputs, outputs, 1, *rest) for _ in range(number - 1))))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(scaled(channels[-1], width), classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``(b, channels, height, width)`` → logits ``(b, classes)``."""
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        logits: Tensor = self.head(self.stages(x).mean((2, 3)))
        return logits


class Block(nn.Module):
    """``relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))``, the first convolution with the stride.

    Args:
        inputs, outputs: channels at width 1.
        pixels: of an output map.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        width: float,
        shortcut: Literal["A", "B"],
        norm_of: NormOf,
        pixels: int,
    ) -> None:
        super().__init__()
        narrow, wide = scaled(inputs, width), scaled(outputs, width)
        self.conv1 = _convolution(narrow, wide, 3, stride)
        self.norm1 = norm_of(outputs, pixels)
        self.conv2 = _convolution(wide, wide, 3, 1)
        self.norm2 = norm_of(outputs, pixels)
        self.shortcut: nn.Module
        if inputs == outputs and stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = ZeroPadded(wide - narrow, stride)
        else:
            self.shortcut = nn.Sequential(_convolution(narrow, wide, 1, stride), norm_of(outputs, pixels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ZeroPadded(nn.Module):
    """Every ``stride``-th pixel, and ``more`` channels of zeros: half of them, rounded down, before and the rest after."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = more // 2, more - more // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _halved(size: tuple[int, ...]) -> tuple[int, ...]:
    """Sides after a layer of stride 2."""
    return tuple((side + 1) // 2 for side in size)
