"""Small convolutional net with GroupNorm."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from hybridfl.build import PositiveInt
from hybridfl.errors import ConfigError


class CNN(nn.Module):
    """Stages of convolution, GroupNorm, ReLU and 2 × 2 max pooling, then one hidden layer.

    GroupNorm keeps no running statistics, so that models of clients with different classes can be averaged
    (Hsieh et al. 2020, arXiv 1910.00189).

    Args:
        input_shape: ``(channels, height, width)``.
        classes: number of logits.
        channels: of each stage.
        hidden: width of the layer before the head.
        groups: of every GroupNorm; must divide the channels.
        kernel: odd side of the convolutions.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        channels: tuple[PositiveInt, ...] = (16, 32),
        hidden: PositiveInt = 64,
        groups: PositiveInt = 4,
        kernel: PositiveInt = 3,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ConfigError("kernel", f"got {kernel}: must be odd; nearest valid value: {kernel + 1}.")
        for width in channels:
            if width % groups:
                raise ConfigError("groups", f"got {groups}, which does not divide the {width} channels of a stage.")
        if min(input_shape[1:]) < 2 ** len(channels):
            side = min(input_shape[1:])
            raise ConfigError("channels", f"{len(channels)} poolings are too many for images of {side} pixels a side.")
        stages: list[nn.Module] = []
        for narrow, wide in itertools.pairwise([input_shape[0], *channels]):
            stages += [
                nn.Conv2d(narrow, wide, kernel, padding=kernel // 2),
                nn.GroupNorm(groups, wide),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        height, width = (side // 2 ** len(channels) for side in input_shape[1:])
        flat = channels[-1] * height * width if channels else input_shape[0] * height * width
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, channels, height, width)`` → logits ``(b, classes)``."""
        logits: Tensor = self.head(self.body(x))
        return logits
