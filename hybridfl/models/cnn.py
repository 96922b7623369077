"""Small convolutional net with GroupNorm."""

from __future__ import annotations

import itertools
from typing import Literal

from torch import Tensor, nn

from hybridfl.build import NonNegativeInt, PositiveFloat, PositiveInt
from hybridfl.errors import ConfigError
from hybridfl.models.width import scaled, scaled_groups


class CNN(nn.Module):
    """Stages of convolution, GroupNorm and ReLU that halve the sides, then one hidden layer.

    GroupNorm keeps no running statistics, so that models of clients with different classes can be averaged
    (Hsieh et al. 2020, arXiv 1910.00189).

    Args:
        input_shape: ``(channels, height, width)``.
        classes: number of logits.
        channels: of each stage.
        hidden: width of the layer before the head; 0 leaves it out.
        groups: of every GroupNorm; must divide the channels.
        kernel: odd side of the convolutions.
        halving: ``pool``: 2 × 2 max pooling after each stage, an odd side rounded down; ``stride``: convolutions with
            stride 2, an odd side rounded up, at a quarter of the arithmetic.
        width: factor on ``channels`` and ``hidden``, see :mod:`hybridfl.models.width`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        channels: tuple[PositiveInt, ...] = (16, 32),
        hidden: NonNegativeInt = 64,
        groups: PositiveInt = 4,
        kernel: PositiveInt = 3,
        halving: Literal["pool", "stride"] = "pool",
        width: PositiveFloat = 1.0,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ConfigError("kernel", f"got {kernel}: must be odd; nearest valid value: {kernel + 1}.")
        norms = [scaled_groups(groups, number, width) for number in channels]
        pools = halving == "pool"
        if pools and min(input_shape[1:]) < 2 ** len(channels):
            side = min(input_shape[1:])
            raise ConfigError("channels", f"{len(channels)} poolings are too many for images of {side} pixels a side.")
        stages: list[nn.Module] = []
        outputs = [input_shape[0], *(scaled(number, width) for number in channels)]
        for (narrow, wide), norm in zip(itertools.pairwise(outputs), norms, strict=True):
            stages += [
                nn.Conv2d(narrow, wide, kernel, stride=1 if pools else 2, padding=kernel // 2),
                nn.GroupNorm(norm, wide),
                nn.ReLU(),
                *([nn.MaxPool2d(2)] if pools else []),
            ]
        halved = 2 ** len(channels)
        rows, columns = (side // halved if pools else -(-side // halved) for side in input_shape[1:])
        flat, dense = outputs[-1] * rows * columns, scaled(hidden, width) if hidden else 0
        between = [nn.Linear(flat, dense), nn.ReLU()] if hidden else []
        self.body = nn.Sequential(*stages, nn.Flatten(), *between)
        self.head = nn.Linear(dense or flat, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, channels, height, width)`` → logits ``(b, classes)``."""
        logits: Tensor = self.head(self.body(x))
        return logits
