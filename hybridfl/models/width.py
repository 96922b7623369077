"""How every net is made narrower or wider by one number, its option ``width``.

Hidden widths (channels, features, heads) are multiplied by ``width``; input channels and logits never are. At width 1 a
net is the one of its paper to the bit; at 1/8 a layer between two hidden ones has 1/64 of its weights (Diao, Ding, Tarokh
2021, arXiv 2010.01264).
"""

from __future__ import annotations

import math

from hybridfl.errors import ConfigError


def scaled(size: int, width: float) -> int:
    """``size · width`` as a whole number: rounded half up, at least 1."""
    return max(1, math.floor(size * width + 0.5))


def scaled_groups(groups: int, channels: int, width: float) -> int:
    """Groups of a GroupNorm over ``scaled(channels, width)`` channels.

    The number of groups is scaled as the channels are, so that a group keeps its size: as few as one channel a group
    would normalise away how strong a channel is. Where that does not come out even, it is the largest divisor of the
    scaled channels below it.

    Args:
        groups, channels: at width 1.

    Raises:
        ConfigError: key ``groups``: they do not divide the channels at width 1.
    """
    if channels % groups:
        close = largest_divisor(channels, groups)
        raise ConfigError(
            "groups",
            f"got {groups}, which does not divide the {channels} channels of a layer; nearest valid value: {close}.",
        )
    return largest_divisor(scaled(channels, width), scaled(groups, width))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``."""
    return next(d for d in range(min(limit, number), 0, -1) if number % d == 0)
