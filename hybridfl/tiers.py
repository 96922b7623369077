"""Device tiers: how wide a net each client can run, as a fraction of all channels.

Budgets are written as in Split-Mix (Hong, Wang, Wang, Zhou, ICLR 2022, arXiv 2203.09747, and the code of its authors):

- ``8-4-2-1``: equal groups with the widths 1/8, 1/4, 1/2 and 1; ``8d3`` in such a list is 3/8. A list ``[0.125, 1]``
  gives the widths themselves. The groups are sorted: of K clients, client i is in group ⌊G i / K⌋.
- ``ln0.5_0.4``: a log-normal distribution with σ = 0.5 and median 0.4, given that it is at least 1/8 and rounded down
  to the widths 1/8, 2/8, …, 1. With its distribution function F, width w begins at client
  ⌊K (F(w) - F(1/8)) / (1 - F(1/8))⌋.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from hybridfl.build import PositiveInt, Range
from hybridfl.errors import ConfigError
from hybridfl.rng import stream

Width = Annotated[float, Range(above=0, high=1)]
Tiers = PositiveInt | str | tuple[Width, ...] | None
Assign = Literal["index", "shuffled", "domain"]

STEPS = 8
"""Widths of a log-normal budget: 1/8, 2/8, …, 1."""
_NUMBER = r"\d+\.?\d*|\.\d+"
_LOG_NORMAL = re.compile(rf"ln({_NUMBER})_({_NUMBER})")
_RATIO = re.compile(r"(\d+)(?:d(\d+))?")


def ladder(tiers: Tiers, rungs: int) -> tuple[float, ...]:
    """The widths of ``rungs`` clients, or domains, in ascending order.

    Raises:
        ConfigError: under the key ``tiers``.
    """
    if tiers is None:
        return (1.0,) * rungs
    if isinstance(tiers, str) and tiers.startswith("ln"):
        return _log_normal(tiers, rungs)
    ratios = sorted(_ratios(str(tiers)) if isinstance(tiers, str | int) else tiers)
    if not ratios:
        raise ConfigError("tiers", "got []: needs a width or more; nearest valid value: null, every client is 1 wide.")
    return tuple(ratios[len(ratios) * i // rungs] for i in range(rungs))


def allot(
    tiers: Tiers, assign: Assign, number: int, seed: int, domains: Sequence[int] | None = None
) -> tuple[float, ...]:
    """The width of each of ``number`` clients.

    Args:
        assign: ``index`` in the order of the clients; ``shuffled`` the same widths in a random order; ``domain`` one
            width for all clients of a domain, in the order of the domains' numbers.
        domains: the number of each client's domain; ``None`` if there is one only.

    Raises:
        ConfigError: ``assign`` asks for domains and there are none.
    """
    if assign == "index" or tiers is None:
        return ladder(tiers, number)
    if assign == "shuffled":
        return tuple(stream(seed, "tiers").permutation(ladder(tiers, number)).tolist())
    if domains is None:
        problem = "got domain, but the data set has one domain; nearest valid value: index."
        raise ConfigError("clients.assign", problem)
    different = sorted(set(domains))
    widths = dict(zip(different, ladder(tiers, len(different)), strict=True))
    return tuple(widths[domain] for domain in domains)


def _ratios(text: str) -> list[float]:
    found = [_RATIO.fullmatch(part) for part in text.split("-")]
    pairs = [(int(match[2] or 1), int(match[1])) if match else (1, 0) for match in found]
    if not all(0 < part <= whole for part, whole in pairs):
        raise ConfigError(
            "tiers",
            f"got '{text}': expected denominators of widths in (0, 1] such as 8-4-2-1, with 8d3 for 3/8, or ln0.5_0.4; "
            "nearest valid value: 8-4-2-1.",
        )
    return [part / whole for part, whole in pairs]


def _log_normal(text: str, rungs: int) -> tuple[float, ...]:
    match = _LOG_NORMAL.fullmatch(text)
    sigma, median = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not (0 < sigma < math.inf and 0 < median < math.inf):
        problem = f"got '{text}': expected ln, σ > 0, _ and a median > 0; nearest valid value: ln0.5_0.4."
        raise ConfigError("tiers", problem)

    def above(width: float) -> float:
        return math.erfc(math.log(width / median) / sigma / math.sqrt(2)) / 2

    at_all = above(1 / STEPS)
    if at_all == 0:
        raise ConfigError("tiers", f"got '{text}': no width is as large as 1/8; nearest valid value: 8.")
    begins = [int(rungs * (1 - above(step / STEPS) / at_all)) for step in range(1, STEPS + 1)]
    return tuple(sum(begin <= i for begin in begins) / STEPS for i in range(rungs))
