"""The numbers of a comparison, free of files and tables: curves in, mean ± sd, paired differences and costs out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

MISSING = math.nan
"""A number that is not defined, such as the accuracy of a global model that does not exist."""

WINDOW = 10
"""Evaluations averaged by ``mean10``."""


def tail_mean(values: Sequence[float], count: int) -> float:
    """Mean of the last ``count`` values (of all, if there are fewer); not defined if one of them is not."""
    window = values[-count:]
    return math.fsum(window) / len(window) if window else MISSING


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof = 1); the latter is not defined for a single value."""
    if not values:
        return MISSING, MISSING
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, MISSING
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean of independent values; not defined for fewer than two of them."""
    mean, sd = mean_sd(values)
    if len(values) < 2:
        return MISSING, MISSING
    from scipy.special import stdtrit  # a tenth of the import time of scipy.stats

    half = float(stdtrit(len(values) - 1, 0.5 + confidence / 2)) * sd / math.sqrt(len(values))
    return mean - half, mean + half


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """Percentile interval for the mean under resampling, the same at every call; not defined for fewer than two values.

    It assumes no normal distribution, but for few values it is too narrow: that of two is from one to the other.
    """
    return quantile_interval(bootstrap_means(values, draws), confidence) if len(values) > 1 else (MISSING, MISSING)


def bootstrap_means(values: Sequence[float], draws: int = 10_000) -> list[float]:
    """Means of ``draws`` resamples, in order; the same at every call."""
    import numpy as np

    from hybridfl.rng import stream

    given = np.asarray(values, dtype=float)
    means = given[stream(0, "bootstrap").integers(len(given), size=(draws, len(given)))].mean(axis=1)
    return np.sort(means).tolist()  # type: ignore[no-any-return]


def quantile_interval(means: Sequence[float], confidence: float) -> tuple[float, float]:
    """What the middle ``confidence`` of ``means`` lies between."""
    import numpy as np

    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def best_round(rounds: Sequence[int], accuracies: Sequence[float]) -> int | None:
    """The round with the highest accuracy, the earliest of equals; None if no accuracy is defined."""
    defined = [(value, -index) for index, value in zip(rounds, accuracies, strict=True) if math.isfinite(value)]
    return -max(defined)[1] if defined else None


@dataclass(frozen=True)
class Observation:
    """What one run says about one cell.

    Args:
        seed: the run's seed.
        pair: what two runs must share to be compared as a pair, that is seed and split; None = cannot be paired.
        value: the metric at the chosen point of the run.
        accuracy: the accuracy at the same point, from which a default target is derived.
        curve: (round, accuracy, bytes moved so far) of every evaluation in the chosen scope.
        bytes: bytes moved until the end.
    """

    seed: Hashable
    pair: Hashable | None
    value: float
    accuracy: float
    curve: Sequence[tuple[int, float, float]]
    bytes: float

    def reach(self, target: float) -> tuple[int, float] | None:
        """Round and bytes of the first evaluation whose accuracy is at least ``target``; None = never."""
        return next(((index, moved) for index, accuracy, moved in self.curve if accuracy >= target), None)


@dataclass(frozen=True)
class Summary:
    """One cell of the table; NaN where a number is not defined.

    ``low`` and ``high`` bound the 95 % interval of ``difference``, the mean over ``pairs`` pairs. ``rounds_to_target``
    and ``bytes_to_target`` are means over the ``reached`` of ``runs`` runs that reach the target. ``p`` is the difference's p
    value, corrected as asked.
    """

    runs: int
    seeds: int
    mean: float
    sd: float
    difference: float
    low: float
    high: float
    pairs: int
    rounds_to_target: float
    reached: int
    bytes_to_target: float
    bytes: float
    p: float = MISSING


def paired(ours: Iterable[Observation], theirs: Iterable[Observation]) -> list[tuple[Observation, Observation]]:
    """Ours with theirs, for every pair of runs with the same seed and the same split."""
    partners = {other.pair: other for other in theirs if other.pair is not None}
    return [(o, partners[o.pair]) for o in ours if o.pair in partners]


def paired_differences(ours: Iterable[Observation], theirs: Iterable[Observation]) -> list[float]:
    """Our value minus theirs for every pair of runs with the same seed and the same split, both defined."""
    defined = [o for o in theirs if math.isfinite(o.value)]
    return [a.value - b.value for a, b in paired(ours, defined) if math.isfinite(a.value)]


def summarise(
    observations: Sequence[Observation], reference: Sequence[Observation], target: float, confidence: float = 0.95
) -> Summary:
    """Everything the table says about one cell.

    Args:
        observations: one run each.
        reference: the runs of the reference in the same column; empty for the reference itself.
        target: accuracy to reach; NaN = never reached.
        confidence: of the interval around the difference.
    """
    defined = [o for o in observations if math.isfinite(o.value)]
    mean, sd = mean_sd([o.value for o in defined])
    differences = paired_differences(defined, reference)
    low, high = t_interval(differences, confidence)
    reached = [found for o in observations if (found := o.reach(target)) is not None]
    return Summary(
        runs=len(observations),
        seeds=len({o.seed for o in defined or observations}),
        mean=mean,
        sd=sd,
        difference=mean_sd(differences)[0],
        low=low,
        high=high,
        pairs=len(differences),
        rounds_to_target=mean_sd([float(index) for index, _ in reached])[0],
        reached=len(reached),
        bytes_to_target=mean_sd([moved for _, moved in reached])[0],
        bytes=mean_sd([o.bytes for o in observations if math.isfinite(o.bytes)])[0],
    )


def default_target(cells: Iterable[Sequence[Observation]], share: float = 0.9) -> float:
    """``share`` of the best cell's mean accuracy, to three decimals so that a caption can state it exactly."""
    means = [mean_sd([o.accuracy for o in cell if math.isfinite(o.accuracy)])[0] for cell in cells]
    defined = [mean for mean in means if math.isfinite(mean)]
    return round(share * max(defined), 3) if defined else MISSING


def rounds_ratio(ours: Sequence[int | None], theirs: Sequence[int | None], rounds: int) -> tuple[float, str]:
    """Our mean rounds to a target over theirs, and what is known of it.

    Args:
        ours, theirs: the round in which each run reached the target; None = not within its ``rounds``.

    Returns:
        The ratio, with ``rounds`` in place of what was not reached, and its bound: ``""`` if all runs reached the target,
        ``"<"`` if some of theirs did not (the ratio is below), ``">"`` if some of ours did not, ``"?"`` if neither is known.
    """
    if not ours or not theirs:
        return MISSING, "?"
    means = [mean_sd([float(rounds if n is None else n) for n in side])[0] for side in (ours, theirs)]
    return means[0] / means[1], {(0, 0): "", (0, 1): "<", (1, 0): ">", (1, 1): "?"}[None in ours, None in theirs]


def power_law(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent b of ``y = a xᵇ`` by least squares on logarithms; pairs that are not positive are left out.

    Not defined where fewer than two different x are left.
    """
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    mean_x, mean_y = (mean_sd([point[i] for point in points])[0] for i in (0, 1))
    spread = math.fsum((a - mean_x) ** 2 for a, _ in points)
    return math.fsum((a - mean_x) * (b - mean_y) for a, b in points) / spread if spread > 0 else MISSING


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share their mean rank. Not defined where all values of a side are equal."""
    a, b = mid_ranks(x), mid_ranks(y)
    (mean_a, sd_a), (mean_b, sd_b) = mean_sd(a), mean_sd(b)
    products = [(p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)]
    return math.fsum(products) / (len(a) - 1) / sd_a / sd_b if len(a) > 1 and sd_a > 0 and sd_b > 0 else MISSING


def mid_ranks(values: Sequence[float]) -> list[float]:
    """The place of each value among all, 1 for the least; equal values share their mean rank."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]
