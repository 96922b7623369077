"""Paired tests and their intervals, one by one or corrected for being many.

An interval and its p value always tell the same: the interval leaves out zero where the corrected p value is below 5 %.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from hybridfl.statistics import MISSING, bootstrap_means, mean_sd, quantile_interval, t_interval

ALPHA = 0.05
INTERVALS = {"t": "Student's t", "bootstrap": "bootstrap"}
CORRECTIONS = {"none": "", "holm": "Holm", "bh": "BH"}
FEW = 10
"""Percentile bootstraps of fewer differences than this are too narrow to be shown without saying so."""
ROUNDING = 1e-12
"""Differences up to this count as none: those of equal numbers are not always zero to the bit."""


@dataclass(frozen=True)
class PairedTest:
    """Of the mean of paired differences against zero, two-sided; NaN for fewer than two of them."""

    p: float = MISSING
    low: float = MISSING
    high: float = MISSING


def paired_tests(samples: Sequence[Sequence[float]], interval: str = "t", correct: str = "none") -> list[PairedTest]:
    """One for each sample of differences; together they are the family that ``correct`` is for.

    Args:
        interval: ``t``, or ``bootstrap``: percentiles of 10,000 means of resampled differences.
        correct: ``none``; ``holm`` (Holm 1979, Scandinavian Journal of Statistics 6): the chance of any false finding is at
            most 5 %; ``bh`` (Benjamini, Hochberg 1995, JRSS B 57): at most 5 % of the findings are expected to be false.
    """
    given = [[0.0 if abs(value) <= ROUNDING else value for value in sample] for sample in samples]
    places = [place for place, sample in enumerate(given) if len(sample) > 1]
    means = {place: bootstrap_means(given[place]) if interval == "bootstrap" else [] for place in places}
    p = [_of_means(means[place]) if interval == "bootstrap" else t_p_value(given[place]) for place in places]
    found = [PairedTest() for _ in given]
    for place, value, confidence in zip(places, adjusted(p, correct), confidences(p, correct), strict=True):
        if interval == "bootstrap":
            low, high = quantile_interval(means[place], confidence)
        else:
            low, high = t_interval(given[place], confidence)
        found[place] = PairedTest(value, low, high)
    return found


def t_p_value(values: Sequence[float]) -> float:
    """Of Student's test of the mean against zero; 1 if all values are zero, 0 if all are another number."""
    if len(values) < 2:
        return MISSING
    mean, sd = mean_sd(values)
    if sd == 0:
        return 0.0 if mean else 1.0
    from scipy.special import stdtr

    return 2 * float(stdtr(len(values) - 1, -abs(mean) / sd * math.sqrt(len(values))))


def _of_means(means: Sequence[float]) -> float:
    """Twice the share of resampled means on the other side of zero, zero counting for both; never quite none."""
    below, above = bisect_right(means, 0.0), len(means) - bisect_left(means, 0.0)
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(means)))


def adjusted(p: Sequence[float], correct: str) -> list[float]:
    """p values that are significant in their family where they are at most 5 %."""
    order, count = sorted(range(len(p)), key=p.__getitem__), len(p)
    found = [*p]
    if correct == "holm":
        worst = 0.0
        for step, place in enumerate(order):
            found[place] = worst = max(worst, min(1.0, (count - step) * p[place]))
    elif correct == "bh":
        best = 1.0
        for step, place in reversed([*enumerate(order, 1)]):
            found[place] = best = min(best, count / step * p[place])
    return found


def confidences(p: Sequence[float], correct: str) -> list[float]:
    """The confidence of each test's interval.

    With ``holm``, at the level at which the test is decided: of m tests that are left, the one with the least p at 1 − α/m, and
    those that are not significant at the level of the first of them. With ``bh``, at 1 − Rα/m for R significant ones of m
    (Benjamini, Yekutieli 2005, JASA 100: the expected share of those R that miss is at most α); of R = 0 as of one.
    """
    significant = [value <= ALPHA for value in adjusted(p, correct)]
    count, findings = len(p), sum(significant)
    if correct == "holm":
        order = sorted(range(count), key=p.__getitem__)
        steps = {place: step for step, place in enumerate(order)}
        return [1 - ALPHA / (count - (steps[i] if significant[i] else findings)) for i in range(count)]
    if correct == "bh":
        return [1 - ALPHA * max(1, findings) / count] * count
    return [1 - ALPHA] * count
