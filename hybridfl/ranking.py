"""Ranks of several methods over several settings: Friedman's test, and Nemenyi's critical difference.

As in Demšar 2006, Statistical comparisons of classifiers over multiple data sets, JMLR 7: a setting is a block, and the mean
over seeds its one measurement, since seeds within a setting are no independent samples of settings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from hybridfl.statistics import mean_sd, mid_ranks

ALPHA = 0.05
COUNTED = 1_000_000
"""Up to so many orders of all blocks but one, the p value is counted: for few blocks that of F is far too small."""
DIGITS = 12
"""Means that agree to so many decimals are equal: a tie must not be decided by rounding."""


@dataclass(frozen=True)
class Friedman:
    """Friedman's test that no method differs, with the correction for ties, as an F test (Iman, Davenport 1980).

    Attributes:
        chi2: Friedman's statistic, corrected for ties.
        f: Iman and Davenport's, infinite where all blocks have the same order.
        degrees: of freedom of ``f``.
        p: of ``chi2`` among all orders of the ranks within blocks where those can be counted, else of ``f``.
        exact: whether they could.
    """

    chi2: float
    f: float
    degrees: tuple[int, int]
    p: float
    exact: bool


def block_ranks(values: Sequence[float], higher_is_better: bool) -> list[float]:
    """Ranks of the methods in one block, 1 the best; equal values share their mean rank."""
    sign = -1 if higher_is_better else 1
    return mid_ranks([sign * round(value, DIGITS) for value in values])


def average_ranks(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Mean rank of each method; ``ranks`` is (blocks, methods)."""
    return [mean_sd(column)[0] for column in zip(*ranks, strict=True)]


def friedman(ranks: Sequence[Sequence[float]]) -> Friedman:
    """The test, of ranks (blocks, methods), two or more of each.

    With ties, χ² = (k − 1) Σⱼ (Rⱼ − n (k + 1) / 2)² / (Σ rᵢⱼ² − n k (k + 1)² / 4) for n blocks, k methods and sums of ranks Rⱼ
    (Conover 1999), and F = (n − 1) χ² / (n (k − 1) − χ²).
    """
    n, k = len(ranks), len(ranks[0])
    degrees = (k - 1, (k - 1) * (n - 1))
    between = math.fsum((math.fsum(column) - n * (k + 1) / 2) ** 2 for column in zip(*ranks, strict=True))
    within = math.fsum(rank**2 for row in ranks for rank in row) - n * k * (k + 1) ** 2 / 4
    if within == 0:
        return Friedman(0.0, 0.0, degrees, 1.0, True)
    chi2 = (k - 1) * between / within
    agreed = all(list(row) == list(ranks[0]) for row in ranks)
    f = math.inf if agreed else (n - 1) * chi2 / (n * (k - 1) - chi2)
    if agreed:
        return Friedman(chi2, f, degrees, float(_orders(ranks[0])) ** (1 - n), True)
    if math.prod(map(_orders, ranks[1:])) <= COUNTED:
        return Friedman(chi2, f, degrees, _exact(ranks), True)
    from scipy.special import fdtrc

    return Friedman(chi2, f, degrees, float(fdtrc(*degrees, f)), False)


def _orders(ranks: Sequence[float]) -> int:
    """In how many ways the ranks of a block can be dealt out."""
    return math.factorial(len(ranks)) // math.prod(map(math.factorial, Counter(ranks).values()))


def _exact(ranks: Sequence[Sequence[float]]) -> float:
    """The chance that sums of ranks differ as much as they do, or more, if every order within a block is as likely.

    The first block can stay as it is, and sums that are a permutation of each other go on in the same way.
    """
    doubled = [[round(2 * rank) for rank in row] for row in ranks]  # whole numbers, mid-ranks too
    ways = Counter({tuple(sorted(doubled[0])): 1})
    for row in doubled[1:]:
        orders, before, ways = set(permutations(row)), ways, Counter()
        for sums, count in before.items():
            for order in orders:
                ways[tuple(sorted(map(int.__add__, sums, order)))] += count
    seen = sum(sum(column) ** 2 for column in zip(*doubled, strict=True))
    return sum(count for sums, count in ways.items() if sum(total**2 for total in sums) >= seen) / ways.total()


def critical_difference(methods: int, blocks: int) -> float:
    """Nemenyi's: average ranks that differ by at least so much differ significantly at 5 %, all pairs taken together."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - ALPHA, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


def groups(averages: Sequence[float], difference: float) -> list[list[int]]:
    """The largest sets of methods, by place, whose average ranks all differ by less than ``difference``, best first.

    Every method is in one at least, a method that differs from all others in one by itself.
    """
    order = sorted(range(len(averages)), key=averages.__getitem__)
    found: list[list[int]] = []
    for start, first in enumerate(order):
        members = [place for place in order[start:] if averages[place] - averages[first] < difference]
        if not found or members[-1] not in found[-1]:
            found.append(members)
    return found
