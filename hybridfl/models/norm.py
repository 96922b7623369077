"""Normalisation layers of the convolutional nets."""

from __future__ import annotations

from typing import Literal

from torch import nn

from hybridfl.errors import ConfigError
from hybridfl.models.width import scaled, scaled_groups

Norm = Literal["group", "batch"]


def norm_layer(kind: Norm, channels: int, groups: int, width: float, pixels: int) -> nn.Module:
    """GroupNorm (Wu, He 2018, arXiv 1803.08494) or BatchNorm (Ioffe, Szegedy 2015, arXiv 1502.03167) with scale and shift.

    Args:
        channels, groups: at width 1; ``groups`` is for GroupNorm.
        width: see :mod:`hybridfl.models.width`.
        pixels: of a map, height times width.

    Raises:
        ConfigError: key ``groups``: they do not divide the channels. Key ``norm`` or ``groups``: a single value would be
            normalised by itself, with BatchNorm as soon as a batch holds one example.
    """
    number = scaled(channels, width)
    if kind == "batch":
        if pixels == 1:
            problem = "the images shrink to one pixel, where a batch of one example has no variance"
            raise ConfigError("norm", f"got batch: {problem}; nearest valid value: group, or take larger images.")
        return nn.BatchNorm2d(number)
    together = scaled_groups(groups, channels, width)
    if pixels * number == together:
        problem = "the images shrink to one pixel, and a group of one channel is a single value there"
        raise ConfigError("groups", f"got {groups}: {problem}; nearest valid value: 1.")
    return nn.GroupNorm(together, number)
