"""Claims: verdicts by hand, what cannot be decided, and what a claim may say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claims_helpers import claim, write
from scipy import stats

from hybridfl import experiment
from hybridfl.build import convert
from hybridfl.claims import COLUMNS, Claim, Evidence, Finding, decide, evidence, findings, found, together
from hybridfl.errors import ConfigError
from hybridfl.runs import Run
from hybridfl.statistics import bootstrap_interval, t_interval


class Shelf:
    """Runs made by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(
        self, name: str, seed: int, scopes: Mapping[str, Sequence[float]] | Sequence[float], split: str = "s"
    ) -> Run:
        write(self.path / f"{name}{seed}", scopes, split)
        config = {"seed": seed, "method": {"name": name}, "rounds": 5}
        return Run(self.path / f"{name}{seed}", config, {"status": "done", "split": split})

    def pair(self, ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[list[Run], list[Run]]:
        """A run a seed on both sides, by their last accuracies or their curves."""
        sides = (("a", ours), ("b", theirs))
        made = [
            [self.run(name, seed, v if isinstance(v, Sequence | Mapping) else [v]) for seed, v in enumerate(values)]
            for name, values in sides
        ]
        return made[0], made[1]

    def finding(self, what: Claim, ours: Sequence[Any], theirs: Sequence[Any]) -> Finding:
        return found(evidence(what, {}, *self.pair(ours, theirs)), t_interval, 0.95)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


# --- one interval against one margin ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "by", "low", "high", "verdict"),
    [
        ("better", 0.01, 0.011, 0.02, "held"),
        ("better", 0.01, 0.005, 0.02, "undecided"),
        ("better", 0.01, -0.02, 0.009, "failed"),
        ("better", 0.01, 0.01, 0.02, "undecided"),
        ("better", 0.0, 0.0, 0.0, "undecided"),
        ("better", 0.0, 0.1, 0.1, "held"),
        ("not_worse", 0.01, -0.005, 0.02, "held"),
        ("not_worse", 0.01, -0.01, 0.0, "held"),
        ("not_worse", 0.01, -0.02, 0.0, "undecided"),
        ("not_worse", 0.01, -0.03, -0.011, "failed"),
        ("not_worse", 0.0, 0.0, 0.0, "held"),
        ("ratio_at_most", 0.5, 0.2, 0.4, "held"),
        ("ratio_at_most", 0.5, 0.5, 0.5, "held"),
        ("ratio_at_most", 0.5, 0.4, 0.6, "undecided"),
        ("ratio_at_most", 0.5, 0.51, 0.6, "failed"),
    ],
)
def test_the_whole_interval_must_be_on_one_side(kind: str, by: float, low: float, high: float, verdict: str) -> None:
    assert claim(kind=kind, by=by).verdict(low, high) == verdict


def test_equal_accuracies_are_equal_whatever_their_last_bit() -> None:
    assert 0.3 - 0.2 != 0.1
    assert claim(by=0.1).verdict(0.3 - 0.2, 0.3 - 0.2) == "undecided"
    assert claim(kind="not_worse", by=0.1).verdict(0.2 - 0.3, 0.2 - 0.3) == "held"


def test_a_gain_is_in_favour_of_the_better_one() -> None:
    assert claim().gain(0.7, 0.5) == pytest.approx(0.2)
    assert claim(metric="loss").gain(0.7, 0.5) == pytest.approx(-0.2)
    assert claim(metric="loss", kind="ratio_at_most", by=1).gain(0.7, 0.5) == pytest.approx(1.4)
    assert math.isnan(claim(kind="ratio_at_most", by=1).gain(0.7, 0.0))


@pytest.mark.parametrize(("by", "verdict"), [(0.1, "held"), (0.3, "failed"), (0.2, "undecided"), (0.17, "held")])
def test_verdicts_of_three_seeds_by_hand(shelf: Shelf, by: float, verdict: str) -> None:
    # differences .19, .20, .21: sd .01, t(.975, 2) = 4.302653, half a width .02484
    one = shelf.finding(claim(by=by), [0.69, 0.50, 0.61], [0.50, 0.30, 0.40])
    assert (one.verdict, one.reason) == (verdict, "")
    assert (one.mean, one.low, one.high) == pytest.approx((0.2, 0.2 - 0.0248414, 0.2 + 0.0248414), abs=1e-6)


def test_the_better_mean_alone_decides_nothing(shelf: Shelf) -> None:
    assert shelf.finding(claim(), [0.6, 0.7, 0.8], [0.5, 0.5, 0.5]).verdict == "undecided"
    one = shelf.finding(claim(), [0.9], [0.1])
    assert (one.verdict, one.mean, one.reason) == ("undecided", 0.8, "1 shared seed, and an interval takes two")


def test_the_same_runs_in_two_scopes(shelf: Shelf) -> None:
    curves = [{"clients": [0.7 + e], "clients/model=local": [0.6]} for e in (0.0, 0.01, 0.02)]
    inside = claim(metric="loss", scope="clients", than="feddle", than_scope="clients/model=local")
    one = shelf.finding(inside, curves, curves)
    assert (one.verdict, one.mean) == ("held", pytest.approx(0.11))


# --- what cannot be decided -------------------------------------------------------------------------------------------


def test_no_run_is_missing_and_says_of_whom(shelf: Shelf) -> None:
    ours, _ = shelf.pair([0.5, 0.6], [])
    lines = (("ours",), ("theirs",))
    lacking = evidence(claim(), {}, ours, [], lines)
    assert found(lacking, t_interval, 0.95).reason == "no run of fedavg"
    assert lacking.advice == (("theirs",),)
    neither = evidence(claim(), {}, [], [], lines)
    assert found(neither, t_interval, 0.95).reason == "no run of feddle or fedavg"
    assert neither.advice == lines
    assert found(neither, t_interval, 0.95).verdict == "missing"


def test_seeds_that_are_not_shared(shelf: Shelf) -> None:
    ours, theirs = shelf.pair([0.5, 0.6], [0.1, 0.1, 0.1, 0.1])
    lines = (("ours",), ("theirs",))
    few = evidence(claim(), {}, ours[:1], theirs, lines)
    assert (found(few, t_interval, 0.95).verdict, few.advice) == ("undecided", (("ours",),))
    apart = evidence(claim(), {}, ours, theirs[2:], lines)
    assert found(apart, t_interval, 0.95).reason == "0 shared seeds, and an interval takes two"
    assert apart.advice == lines


def test_a_pair_with_another_split_is_not_left_out_in_silence(shelf: Shelf) -> None:
    ours = [shelf.run("a", seed, [0.9]) for seed in range(3)]
    theirs = [shelf.run("b", seed, [0.1], "other" if seed == 2 else "s") for seed in range(3)]
    one = found(evidence(claim(), {}, ours, theirs), t_interval, 0.95)
    assert (one.verdict, one.reason) == (
        "undecided",
        "1 of 3 shared seeds have other data, splits, starts or clients",
    )


def test_a_claim_may_be_about_certain_seeds(shelf: Shelf) -> None:
    def side(name: str, accuracies: Sequence[float]) -> list[Run]:
        return [shelf.run(name, seed, [value]) for seed, value in enumerate(accuracies)]

    ours, theirs = side("a", [0.9, 0.5, 0.6, 0.7]), side("b", [0.1, 0.4, 0.4, 0.4])
    seen = evidence(claim(seeds=(1, 3)), {}, ours, theirs)
    assert list(seen.gains.values()) == pytest.approx([0.1, 0.3])
    assert evidence(claim(seeds=(1,)), {}, ours, theirs).lacks == "1 shared seed, and an interval takes two"
    assert evidence(claim(seeds=(7,)), {}, ours, theirs).absent == (0, 1)


def test_pairs_may_differ_in_what_the_claim_compares(shelf: Shelf) -> None:
    def side(name: str, accuracies: Sequence[float], delay: int, number: int = 5) -> list[Run]:
        runs = [shelf.run(name, seed, [value]) for seed, value in enumerate(accuracies)]
        for run in runs:
            run.config["clients"] = {"delay": delay, "number": number}
        return runs

    late, punctual, fewer = side("a", [0.7, 0.8], 4), side("b", [0.8, 0.9], 0), side("c", [0.8, 0.9], 0, number=4)
    lacks = "2 of 2 shared seeds have other data, splits, starts or clients"
    assert evidence(claim(), {}, late, punctual).lacks == lacks
    for key in ("clients.delay", "clients"):
        seen = evidence(claim(than_where={key: "0"}), {}, late, punctual)
        assert list(seen.gains.values()) == pytest.approx([-0.1, -0.1])
    assert evidence(claim(than_where={"clients.delay": "0"}), {}, late, fewer).lacks == lacks


@pytest.mark.parametrize("place", [0, 1])
def test_an_undefined_number_is_not_left_out_in_silence(shelf: Shelf, place: int) -> None:
    sides = [[0.9, 0.9, 0.9], [0.1, 0.1, 0.1]]
    sides[place][1] = math.nan
    one = shelf.finding(claim(), *sides)
    assert (one.verdict, one.reason) == ("undecided", "accuracy is not defined in 1 of 3 pairs")


def test_nothing_is_a_ratio_to_zero(shelf: Shelf) -> None:
    one = shelf.finding(claim(kind="ratio_at_most", by=0.5), [0.1, 0.1], [0.0, 0.5])
    assert (one.verdict, one.reason) == ("undecided", "accuracy of fedavg is 0, which nothing can be a ratio to")


# --- costs ------------------------------------------------------------------------------------------------------------

FAST, SLOW, NEVER = [0.5, 0.9, 0.9, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4, 0.9], [0.1] * 5
HALF = {"metric": "rounds_to_target", "target": 0.85, "kind": "ratio_at_most", "by": 0.5}


def test_rounds_and_bytes_to_a_target(shelf: Shelf) -> None:
    one = shelf.finding(claim(**HALF), [FAST, FAST, FAST], [SLOW, SLOW, SLOW])
    assert one.verdict == "held"
    assert (one.mean, one.low, one.high) == pytest.approx((0.4, 0.4, 0.4))
    assert shelf.finding(claim(**HALF | {"by": 0.3}), [FAST, FAST], [SLOW, SLOW]).verdict == "failed"
    saved = claim(metric="bytes_to_target", target=0.85)
    assert shelf.finding(saved, [FAST, FAST], [SLOW, SLOW]).mean == (5 - 2) * 3e6
    assert shelf.finding(claim(metric="bytes"), [FAST, FAST], [FAST[:4], FAST[:4]]).mean == -3e6


def test_who_never_reaches_the_target_cannot_win_by_it(shelf: Shelf) -> None:
    # theirs would need more than its 5 rounds: as good as 5, and better for ours
    assert shelf.finding(claim(**HALF), [FAST, FAST], [NEVER, NEVER]).verdict == "held"
    # ours would need more than 5: against 2 it has lost already, against 5 nothing is known
    assert shelf.finding(claim(**HALF), [NEVER, NEVER], [FAST, FAST]).verdict == "failed"
    one = shelf.finding(claim(**HALF | {"by": 1}), [NEVER, NEVER], [SLOW, SLOW])
    assert (one.verdict, one.reason) == ("undecided", "some runs of feddle never reach 85 %")
    # nor does theirs lose by it
    one = shelf.finding(claim(**HALF), [SLOW, SLOW], [NEVER, NEVER])
    assert (one.verdict, one.reason) == ("undecided", "some runs of fedavg never reach 85 %")


def test_costs_that_add_up_are_read_at_the_end(shelf: Shelf) -> None:
    assert shelf.finding(claim(metric="macs"), [[0.5] * 2] * 2, [[0.5] * 4] * 2).mean == 2e9
    assert shelf.finding(claim(), [[0.2, 0.4]] * 2, [[0.0]] * 2).mean == pytest.approx(0.3)
    assert shelf.finding(claim(at="last"), [[0.2, 0.4]] * 2, [[0.0]] * 2).mean == pytest.approx(0.4)


# --- several cells, several claims ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "verdicts", "expected"),
    [
        ("all", ["held", "held"], "held"),
        ("all", ["held", "undecided"], "undecided"),
        ("all", ["held", "missing"], "missing"),
        ("all", ["undecided", "missing", "failed"], "failed"),
        ("any", ["failed", "missing", "held"], "held"),
        ("any", ["failed", "failed"], "failed"),
        ("any", ["failed", "undecided"], "undecided"),
        ("any", ["failed", "missing"], "missing"),
    ],
)
def test_cells_together(cells: Any, verdicts: list[Any], expected: str) -> None:
    assert together(claim(cells=cells), verdicts) == expected


def gains(*values: float, **options: Any) -> Evidence:
    return Evidence(claim(**options), {}, dict(enumerate(values)))


def test_the_mean_over_cells_seed_by_seed() -> None:
    one, other = gains(0.1, 0.5, 0.3, 0.9, cells="mean"), gains(0.5, 0.1, 0.3, cells="mean")
    (decision,) = decide([(one.claim, [one, other])], t_interval, 0.95, False)
    (finding,) = decision.findings
    assert finding.evidence.gains == pytest.approx({0: 0.3, 1: 0.3, 2: 0.3})
    assert (decision.verdict, finding.mean) == ("held", pytest.approx(0.3))
    apart = Evidence(one.claim, {}, {7: 0.1, 8: 0.2})
    (decision,) = decide([(one.claim, [one, apart])], t_interval, 0.95, False)
    assert decision.findings[0].reason == "0 seeds are in all cells, and an interval takes two"
    gone = Evidence(one.claim, {}, absent=(1,))
    assert decide([(one.claim, [one, gone])], t_interval, 0.95, False)[0].verdict == "missing"


def test_every_claim_gets_its_own_cells() -> None:
    good, bad = gains(0.2, 0.21, 0.19), gains(-0.2, -0.21, -0.19)
    decisions = decide([(good.claim, [good]), (bad.claim, [bad, good]), (good.claim, [good])], t_interval, 0.95, False)
    assert [decision.verdict for decision in decisions] == ["held", "failed", "held"]
    assert [len(decision.findings) for decision in decisions] == [1, 2, 1]


def test_holm_agrees_with_its_p_values() -> None:
    rng = np.random.default_rng(3)
    kinds = set()
    for _ in range(40):
        samples = [rng.normal(rng.choice([0, 0.6, -1.0]), 0.5, 5) for _ in range(4)]
        p = np.array([stats.ttest_1samp(sample, 0).pvalue for sample in samples])
        order = np.argsort(p)
        passed = np.cumprod([p[at] <= 0.05 / (len(p) - rank) for rank, at in enumerate(order)])
        expected = {int(at) for at, good in zip(order, passed, strict=True) if good}
        parts = [gains(*map(float, sample)) for sample in samples]
        parts.insert(2, Evidence(claim(), {}, lacks="one seed"))
        judged = findings(parts, t_interval, 0.95, holm=True)
        assert judged.pop(2).verdict == "undecided"
        assert {place for place, one in enumerate(judged) if one.verdict != "undecided"} == expected
        alone = [one for one in findings(parts, t_interval, 0.95, holm=False) if one.verdict != "undecided"]
        kinds.add((len(expected), len(alone)))
    assert any(few < many for few, many in kinds)
    assert len({few for few, _ in kinds}) > 2


def test_the_bootstrap_is_that_of_all_resamples() -> None:
    values = [0.0, 1.0, 5.0]
    every = np.sort([np.mean([a, b, c]) for a in values for b in values for c in values])
    assert bootstrap_interval(values, 0.8) == pytest.approx(np.quantile(every, [0.1, 0.9], method="inverted_cdf"))
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert all(map(math.isnan, bootstrap_interval([1.0])))


# --- the schema -------------------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "claims[0].metric: got 'acuracy'. Did you mean 'accuracy'?": {"metric": "acuracy"},
    "claims[0].target: is required for rounds_to_target": {"metric": "rounds_to_target"},
    "claims[0].target: got 0.5, but accuracy has no target": {"target": 0.5},
    "claims[0].target: got 85: must be at most 1": {"metric": "rounds_to_target", "target": 85},
    "claims[0].by: is required for ratio_at_most": {"kind": "ratio_at_most"},
    "claims[0].by: got -0.1: must be at least 0": {"by": -0.1},
    "claims[0].kind: got 'beter'. Did you mean 'better'?": {"kind": "beter"},
    "claims[0].cells: got 'most'.": {"cells": "most"},
    "claims[0].at: got mean10: forgetting is defined after the last task": {"metric": "forgetting", "at": "mean10"},
    "claims[0].than: got feddle, as better": {"than": "feddle"},
    "claims[0].wher: unknown key. Did you mean 'where'?": {"wher": {}},
    "claims[0].where: got 0.1": {"where": 0.1},
}


@pytest.mark.parametrize("problem", WRONG)
def test_a_wrong_claim(problem: str) -> None:
    node = {"id": "c", "text": "…", "better": "feddle", "than": "fedavg", **WRONG[problem]}
    with pytest.raises(ConfigError) as caught:
        convert([node], tuple[Claim, ...], "claims")
    assert str(caught.value).startswith(problem)


def test_the_metrics_are_the_columns_that_runs_have() -> None:
    assert set(COLUMNS) == set(experiment.METRICS) - {"round", "scope"}
