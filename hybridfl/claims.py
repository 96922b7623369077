"""Claims as data: what a preset says of its runs, and whether the stored runs bear it out.

A claim is held or failed only where the whole interval of a paired comparison lies on one side of its margin; a mean alone
decides nothing. Pairs are those of ``hybridfl compare``: same seed, split, start and clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from hybridfl.build import Fraction, NonNegativeFloat
from hybridfl.errors import ConfigError, nearest
from hybridfl.runs import COSTS, Run
from hybridfl.statistics import MISSING, Observation, mean_sd, paired
from hybridfl.tabulate import HIGHER_IS_BETTER, OF_STREAMS, Options, observe

Verdict = Literal["held", "failed", "undecided", "missing"]
Interval = Callable[[Sequence[float], float], tuple[float, float]]
Where = dict[str, Any]
Advice = tuple[str, ...]
"""The overrides of runs, without their seeds."""

TO_TARGET = ("rounds_to_target", "bytes_to_target")
COLUMNS = ("accuracy", "loss", "worst10", "spread", "examples", "parameters", "inference_macs", *COSTS)
METRICS = (*COLUMNS, *OF_STREAMS, *TO_TARGET, "bytes")
"""Columns of ``metrics.csv``, metrics of streams, and the costs of ``hybridfl compare``."""
ROUNDING = 1e-9
"""How far from a margin a number counts as the margin itself: differences of equal accuracies are not equal to the bit."""


@dataclass(frozen=True)
class Claim:
    """One thing that a preset says of its runs.

    ``better`` is compared with ``than`` in every cell. The gain of a pair is the difference in favour of ``better``: accuracies
    are better when high, losses, costs, rounds and forgetting when low.

    Attributes:
        id: a name, unique in its preset.
        text: the claim in words.
        better: a method by the name it has in ``baseline=`` or ``merging=``.
        than: another, or the same in another scope or other settings.
        metric: one of :data:`METRICS`; costs that add up are read at the end.
        kind: ``better``: the mean gain is above ``by``; ``not_worse``: it is not below ``-by``; ``ratio_at_most``: the mean ratio of
            ``better`` to ``than`` is not above ``by``.
        by: the margin, in the metric's unit: 0.01 of an accuracy is a point.
        where: config keys with a value, or a list of them that makes several cells; or a list of such cells. Keys that the preset
            sweeps and that are not named here make cells too. A text is the name of one of the preset's cells.
        cells: the claim is about ``all`` cells, ``any`` of them, or the ``mean`` over them, seed by seed.
        scope: of both.
        at: ``last``, ``mean10`` or ``best`` as in ``hybridfl compare``; ``auto`` is its default, and the end for costs.
        target: the accuracy of ``rounds_to_target`` and ``bytes_to_target``. A run that never reaches it counts with its last
            evaluation, and then its own side cannot win by it.
        than_scope: of ``than``, if another.
        than_where: settings of ``than`` beside or instead of those of ``where``; pairs may differ in them.
        seeds: the only ones that count, such as those that have chosen nothing; empty is all that are stored.
    """

    id: str
    text: str
    better: str
    than: str
    metric: str = "accuracy"
    kind: Literal["better", "not_worse", "ratio_at_most"] = "better"
    by: NonNegativeFloat = 0.0
    where: Where | str | list[Where | str] = field(default_factory=dict)
    cells: Literal["all", "any", "mean"] = "all"
    scope: str = "global"
    at: Literal["auto", "last", "mean10", "best"] = "auto"
    target: Fraction | None = None
    than_scope: str | None = None
    than_where: Where = field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError("metric", f"got '{self.metric}'. {nearest(self.metric, METRICS)}")
        if self.metric in TO_TARGET and self.target is None:
            raise ConfigError("target", f"is required for {self.metric}: an accuracy such as 0.85.")
        if self.metric not in TO_TARGET and self.target is not None:
            problem = (
                f"got {self.target:g}, but {self.metric} has no target; leave it out, or try metric: rounds_to_target."
            )
            raise ConfigError("target", problem)
        if self.kind == "ratio_at_most" and not self.by:
            raise ConfigError("by", "is required for ratio_at_most and above 0, such as 0.5 for at most half.")
        if self.metric in OF_STREAMS and self.at not in ("auto", "last"):
            problem = f"got {self.at}: {self.metric} is defined after the last task; nearest valid value: last."
            raise ConfigError("at", problem)
        if self.better == self.than and not self.than_where and self.than_scope in (None, self.scope):
            problem = f"got {self.than}, as better; name another method, or give than_where or than_scope."
            raise ConfigError("than", problem)

    @property
    def margin(self) -> float:
        """What the gain, or the ratio, is compared with."""
        return -self.by if self.kind == "not_worse" else self.by

    def gain(self, ours: float, theirs: float) -> float:
        """Of one pair; a ratio if the claim is about one, not defined for a zero to divide by."""
        if self.kind == "ratio_at_most":
            return ours / theirs if theirs else MISSING
        return ours - theirs if self.metric in HIGHER_IS_BETTER else theirs - ours

    def verdict(self, low: float, high: float) -> Verdict:
        """Of an interval: on the good side of the margin as a whole, on the bad side, or neither.

        The margin itself is good enough for ``not_worse`` and ``ratio_at_most``.
        """
        margin = self.margin
        if self.kind == "ratio_at_most":
            low, high, margin = -high, -low, -margin
        if low > margin + (ROUNDING if self.kind == "better" else -ROUNDING):
            return "held"
        return "failed" if high < margin - ROUNDING else "undecided"

    def observe(self, run: Run, scope: str) -> tuple[Observation, bool]:
        """What a run says, and whether its value is only a lower bound."""
        at = self.at
        if at == "auto":
            at = "last" if len(run.tasks) > 1 or self.metric in COSTS else "mean10"
        seen = observe(run, Options(metric=self.metric, scope=scope, at=at), apart=self.than_where)
        if self.metric == "bytes":
            return replace(seen, value=seen.bytes), False
        if self.metric not in TO_TARGET or self.target is None:
            return seen, False
        reached = seen.reach(self.target)
        end = (seen.curve[-1][0], seen.curve[-1][2]) if seen.curve else (MISSING, MISSING)
        return replace(seen, value=float((reached or end)[TO_TARGET.index(self.metric)])), reached is None


@dataclass(frozen=True)
class Evidence:
    """What the stored runs say of a claim in one cell.

    Attributes:
        where: the cell.
        gains: one for each shared seed.
        cannot: verdicts that the values, being bounds, do not carry.
        lacks: why there is nothing to decide, if so.
        absent: places in (better, than) of which there is no run.
        advice: what would bring the runs that are too few.
    """

    claim: Claim
    where: Mapping[str, str]
    gains: Mapping[Hashable, float] = field(default_factory=dict)
    cannot: frozenset[Verdict] = frozenset()
    lacks: str = ""
    absent: tuple[int, ...] = ()
    advice: tuple[Advice, ...] = ()

    @property
    def decidable(self) -> bool:
        return not self.lacks and not self.absent


@dataclass(frozen=True)
class Finding:
    """The interval of some evidence and its verdict; NaN where not defined."""

    evidence: Evidence
    verdict: Verdict
    mean: float = MISSING
    low: float = MISSING
    high: float = MISSING
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    """The verdict on a claim, and what was found in its cells (with ``cells: mean``, in all of them together)."""

    claim: Claim
    verdict: Verdict
    findings: Sequence[Finding]


def evidence(
    claim: Claim,
    where: Mapping[str, str],
    ours: Sequence[Run],
    theirs: Sequence[Run],
    lines: tuple[Advice, Advice] = ((), ()),
) -> Evidence:
    """Pairs of the runs of one cell.

    Args:
        ours: of ``better``, one a seed.
        theirs: of ``than``.
        lines: what would make more of each.
    """
    if claim.seeds:
        ours, theirs = ([run for run in runs if run.value("seed") in claim.seeds] for runs in (ours, theirs))
    absent = tuple(place for place, runs in enumerate((ours, theirs)) if not runs)
    if absent:
        return Evidence(claim, where, absent=absent, advice=tuple(lines[place] for place in absent))
    scopes = (claim.scope, claim.than_scope or claim.scope)
    sides = [[claim.observe(run, scope) for run in runs] for runs, scope in zip((ours, theirs), scopes, strict=True)]
    late = [{seen.pair for seen, bound in side if bound} for side in sides]
    pairs = paired(*([seen for seen, _ in side] for side in sides))
    gains = {a.seed: claim.gain(a.value, b.value) for a, b in pairs}
    cannot: set[Verdict] = set()
    if any(a.pair in late[0] for a, _ in pairs):
        cannot.add("held")
    if any(b.pair in late[1] for _, b in pairs):
        cannot.add("failed")
    seeds = {a.seed for a, _ in sides[0]} & {b.seed for b, _ in sides[1]}
    short = tuple(line for line, runs in zip(lines, (ours, theirs), strict=True) if len(runs) < 2)
    advice = (short or lines) if len(seeds) < 2 else ()
    return Evidence(claim, where, gains, frozenset(cannot), _lacks(claim, pairs, len(seeds)), advice=advice)


def _lacks(claim: Claim, pairs: Sequence[tuple[Observation, Observation]], seeds: int) -> str:
    undefined = sum(not (math.isfinite(a.value) and math.isfinite(b.value)) for a, b in pairs)
    if undefined:
        return f"{claim.metric} is not defined in {undefined} of {len(pairs)} pairs"
    if claim.kind == "ratio_at_most" and not all(b.value for _, b in pairs):
        return f"{claim.metric} of {claim.than} is 0, which nothing can be a ratio to"
    if seeds > len(pairs):
        return f"{seeds - len(pairs)} of {seeds} shared seeds have other data, splits, starts or clients"
    return (
        "" if len(pairs) > 1 else f"{len(pairs)} shared seed{'' if len(pairs) == 1 else 's'}, and an interval takes two"
    )


def averaged(parts: Sequence[Evidence]) -> Evidence:
    """The mean over cells, seed by seed; of the seeds that all cells have."""
    first = parts[0]
    seeds = [seed for seed in first.gains if all(seed in part.gains for part in parts)]
    gains = {seed: fmean(part.gains[seed] for part in parts) for seed in seeds}
    absent = tuple(sorted({place for part in parts for place in part.absent}))
    lacks = next((part.lacks for part in parts if part.lacks), "")
    if not lacks and len(seeds) < 2:
        lacks = f"{len(seeds)} seeds are in all cells, and an interval takes two"
    cannot = frozenset(verdict for part in parts for verdict in part.cannot)
    advice = tuple(line for part in parts for line in part.advice)
    return Evidence(first.claim, {}, gains, cannot, lacks, absent, advice)


def found(what: Evidence, interval: Interval, confidence: float) -> Finding:
    """The verdict on one cell."""
    mean = mean_sd([*what.gains.values()])[0]
    if what.absent:
        return Finding(what, "missing", reason=f"no run of {' or '.join(_sides(what))}")
    if what.lacks:
        return Finding(what, "undecided", mean, reason=what.lacks)
    low, high = interval([*what.gains.values()], confidence)
    verdict = what.claim.verdict(low, high)
    if verdict in what.cannot:
        whose = what.claim.better if verdict == "held" else what.claim.than
        goal = 100 * (what.claim.target or MISSING)
        return Finding(what, "undecided", mean, low, high, f"some runs of {whose} never reach {goal:g} %")
    return Finding(what, verdict, mean, low, high)


def _sides(what: Evidence) -> list[str]:
    names = (what.claim.better, what.claim.than)
    return list(dict.fromkeys(names[place] for place in what.absent))


def findings(parts: Sequence[Evidence], interval: Interval, confidence: float, holm: bool) -> list[Finding]:
    """The verdicts on all cells of all claims, with ``holm`` so that all of them together err with 1 - ``confidence``.

    Holm 1979 (Scandinavian Journal of Statistics 6): of m undecided cells each is looked at with the error (1 - confidence) / m;
    what that decides leaves fewer, and so on until it decides none.
    """
    if not holm:
        return [found(part, interval, confidence) for part in parts]
    results: dict[int, Finding] = {}
    rest = [place for place, part in enumerate(parts) if part.decidable]
    now: dict[int, Finding] = {}
    while rest:
        now = {place: found(parts[place], interval, 1 - (1 - confidence) / len(rest)) for place in rest}
        decided = {place: one for place, one in now.items() if one.verdict != "undecided"}
        results |= decided
        rest = [place for place in rest if place not in decided]
        if not decided:
            break
    results |= {place: now[place] for place in rest}
    return [results.get(place) or found(part, interval, confidence) for place, part in enumerate(parts)]


def decide(
    claims: Sequence[tuple[Claim, Sequence[Evidence]]], interval: Interval, confidence: float, holm: bool
) -> list[Decision]:
    """The verdict on every claim of a preset, from the evidence in each of its cells."""
    parts = [[averaged(given)] if claim.cells == "mean" else list(given) for claim, given in claims]
    judged = iter(findings([part for given in parts for part in given], interval, confidence, holm))
    decisions = []
    for (claim, _), given in zip(claims, parts, strict=True):
        cells = [next(judged) for _ in given]
        decisions.append(Decision(claim, together(claim, [cell.verdict for cell in cells]), cells))
    return decisions


def together(claim: Claim, verdicts: Collection[Verdict]) -> Verdict:
    """One verdict from those of the cells: a claim of all fails with one of them, a claim of any holds with one of them."""
    one, every = ("held", "failed") if claim.cells == "any" else ("failed", "held")
    if one in verdicts:
        return "held" if one == "held" else "failed"
    if "missing" in verdicts:
        return "missing"
    if all(verdict == every for verdict in verdicts):
        return "held" if every == "held" else "failed"
    return "undecided"
