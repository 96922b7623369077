"""What the probes note of a run: numbers of every round, and of every anchor in it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from hybridfl import params as P
from hybridfl.config import Composed, Composer
from hybridfl.merging import spans as S
from hybridfl.plan import DataCache, Plan, make_plan
from hybridfl.scoring import ScoredSet
from hybridfl.types import Served
from theory.levels import Levels, Line, Row
from theory.watching import Moment, watched


def of_the_round(moment: Moment) -> Row:
    """What T1, T2 and T5 ask of a round; shares and variances of a merge need one with arrivals."""
    anchors, fresh = ([e["update"] for e in entries] for entries in (moment.entries, moment.arrivals))
    if not fresh:
        return {}
    g, rows, length = moment.clients_gradient, S.basis(anchors), moment.work_length
    step = P.flatten(moment.after.state["global"].params) - P.flatten(moment.model.params)
    sigma = S.second_moment(S.errors(anchors, g, length))
    sigma_fresh = S.second_moment(S.errors(fresh, g, length))
    return {
        "anchors": len(anchors),
        "gradient": float(g.double().square().sum()),
        "cos2_mean": S.cosine(torch.stack(fresh).mean(0), g) ** 2,
        "cos2_merge": S.cosine(step, g) ** 2,
        "captured": S.captured(rows, g),
        "captured_at_random": len(rows) / len(g),
        "variance_mean": S.of_the_mean(sigma_fresh),
        "variance_best_arrivals": S.least_variance(sigma_fresh)[0],
        "variance_best_atlas": S.least_variance(sigma)[0],
        # The step itself, whatever the coefficients were: sum c_i a_i = -η (g + e).
        "variance_merge": S.second_moment(S.errors([step], g, length)).item(),
        "epsilon": S.surrogate_gap(rows, moment.surrogate_gradient, g),
    }


def coefficients(moment: Moment) -> list[Row]:
    """Of every anchor, relative to a fresh one's 1/m, as ``method.csv`` has them but for the unit."""
    noisy, m = set(moment.plan.federation.noisy_clients), len(moment.arrivals)
    return [
        {
            "round": moment.index + 1,
            "client": entry["client"],
            "noisy": entry["client"] in noisy,
            "fresh": entry["added"] == moment.index,
            "staleness": moment.index - entry["birth"],
            "coefficient": m * float(entry["coefficients"].mean()),
        }
        for entry in moment.entries
    ]


@dataclass(frozen=True)
class Trace:
    """Numbers of a run: of each round, and of each anchor in each round."""

    rounds: list[Row]
    coefficients: list[Row]


def traced(plan: Plan) -> Trace:
    federation = plan.federation
    test = ScoredSet(federation, *federation.test)
    trace = Trace([], [])
    for moment in watched(plan):
        accuracy, _ = test.scored([Served(moment.after.state["global"])]).at(slice(None))
        trace.rounds.append({"round": moment.index + 1, "accuracy": accuracy, **of_the_round(moment)})
        trace.coefficients.extend(coefficients(moment))
    return trace


@dataclass(eq=False)
class Lab:
    """Runs by their overrides, each done once.

    Attributes:
        further: overrides of every run after those of the levels.
        composed, traces: what is known already.
    """

    levels: Levels
    seeds: Sequence[int]
    further: Line = ()
    data: DataCache = field(default_factory=DataCache)
    composed: dict[Line, Composed] = field(default_factory=dict)
    traces: dict[tuple[Line, int, int], Trace] = field(default_factory=dict)

    def plan(self, line: Line, seed: int, rounds: int) -> Plan:
        if line not in self.composed:
            fixed = ("executor=sequential", "device=cpu", "ui=none")
            with Composer() as composer:
                self.composed[line] = composer.compose([*self.levels.base, *fixed, *line, *self.further])
        known = self.composed[line]
        return make_plan(replace(known, config={**known.config, "seed": seed, "rounds": rounds}), self.data)

    def trace(self, line: Line, seed: int, rounds: int) -> Trace:
        key = (line, seed, rounds)
        if key not in self.traces:
            began = time.perf_counter()
            self.traces[key] = traced(self.plan(line, seed, rounds))
            seconds = time.perf_counter() - began
            print(f"{seconds:6.1f} s  seed={seed} rounds={rounds} {' '.join(line)}", file=sys.stderr, flush=True)
        return self.traces[key]

    def rounds_of(self, settings: Mapping[str, Line], rounds: int) -> list[Row]:
        """Rows of all rounds of runs with these names, and all seeds."""
        return [
            {"setting": name, "seed": seed, **row}
            for seed in self.seeds
            for name, line in settings.items()
            for row in self.trace(line, seed, rounds).rounds
        ]
