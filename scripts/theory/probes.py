"""The six probes: what is measured, expected, told and drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from theory.levels import Levels, Row
from theory.measures import (
    coefficients_by_quality,
    excess_losses,
    rounds_to_target,
    span_of_the_atlas,
    surrogates,
    variances,
)
from theory.plots import draw_coefficients, draw_excess, draw_rounds, draw_span, draw_surrogates, draw_variances
from theory.tables import Lines, tell_coefficients, tell_excess, tell_rounds, tell_span, tell_surrogates, tell_variances
from theory.traces import Lab


@dataclass(frozen=True)
class Probe:
    """What is measured, what the theory expects, how it is told and drawn."""

    title: str
    expected: str
    measure: Callable[[Lab], list[Row]]
    tell: Callable[[list[Row], Levels], Lines]
    draw: Callable[[list[Row], Levels, Any], None]


PROBES = {
    "T1": Probe(
        "cos² of g with the mean update and with the merge made, and ‖P g‖² / ‖g‖²; first and last quarter of the rounds",
        "span far above mean; grows with K; gap widens with heterogeneity",
        span_of_the_atlas,
        tell_span,
        draw_span,
    ),
    "T2": Probe(
        "1'Σ1/m² over the variance of other merges, medians over rounds",
        "ratio to the best at least 1, towards 1 when iid, synchronous and without noise",
        variances,
        tell_variances,
        draw_variances,
    ),
    "T3": Probe(
        "rounds to the target accuracy, by seed",
        "ratio Feddle / FedBuff falls as it gets harder",
        rounds_to_target,
        tell_rounds,
        draw_rounds,
    ),
    "T4": Probe(
        "excess loss on fresh data of c searched on n_s examples (in brackets: gain over the mean of the arrivals)",
        "grows like sqrt(K / n_s)",
        excess_losses,
        tell_excess,
        draw_excess,
    ),
    "T5": Probe(
        "ε = 1 - cos(P ∇f̃, P g), mean over rounds, and the error of the last quarter",
        "the error floor grows with ε",
        surrogates,
        tell_surrogates,
        draw_surrogates,
    ),
    "T6": Probe(
        "mean coefficient times m (number of anchors)",
        "about 0 for noisy anchors; falling with staleness",
        coefficients_by_quality,
        tell_coefficients,
        draw_coefficients,
    ),
}
