"""Multi-layer perceptron."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from hybridfl.build import PositiveFloat, PositiveInt
from hybridfl.models.width import scaled


class MLP(nn.Module):
    """Fully connected layers with ReLU between them.

    Args:
        input_shape: of one example, any number of axes.
        classes: number of logits.
        hidden: widths of the hidden layers; an empty list is a linear classifier.
        width: factor on the hidden widths, see :mod:`hybridfl.models.width`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        hidden: tuple[PositiveInt, ...] = (64,),
        width: PositiveFloat = 1.0,
    ) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *(scaled(size, width) for size in hidden)]
        layers: list[nn.Module] = [nn.Flatten()]
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Linear(narrow, wide), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, *input_shape)`` → logits ``(b, classes)``."""
        logits: Tensor = self.head(self.body(x))
        return logits
