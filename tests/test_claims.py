"""Claims: verdicts by hand, what cannot be decided, and what ``hybridfl claims`` says of stored runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli_helpers import TINY, Answer, call, done
from scipy import stats

from hybridfl import experiment
from hybridfl.build import convert
from hybridfl.claims import COLUMNS, Claim, Evidence, Finding, decide, evidence, findings, found, together
from hybridfl.config import Composer, choices
from hybridfl.errors import ConfigError
from hybridfl.runs import Run
from hybridfl.statistics import bootstrap_interval, t_interval
from hybridfl.study import Runs, Study, study_of

HEADER = "round,scope,accuracy,loss,bytes_up,bytes_down,bytes_peer,macs"


def claim(**options: Any) -> Claim:
    return Claim(**{"id": "c", "text": "…", "better": "feddle", "than": "fedavg", **options})


def write(folder: Path, scopes: Mapping[str, Sequence[float]] | Sequence[float], split: str = "s") -> None:
    """Metrics of a run in which every round moves 1 MB up and 2 MB down, and the loss is 1 - accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = scopes if isinstance(scopes, Mapping) else {"global": scopes}
    rows = [
        f"{round},{scope},{value},{1 - value},{round}e6,{2 * round}e6,,{round}e9"
        for scope, values in curves.items()
        for round, value in enumerate(values, 1)
    ]
    (folder / "metrics.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    (folder / "status.json").write_text(json.dumps({"status": "done", "split": split}))


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


# --- the command ------------------------------------------------------------------------------------------------------

PRESET = """\
# @package _global_
# A study with claims.
partitioning:
  alpha: 0.1
tuned:
  fedprox: {client_optimizer.lr: 0.05}
claims:
  - {id: good, text: Feddle is better., better: feddle, than: fedavg}
  - {id: bad, text: Feddle is much better., better: feddle, than: fedavg, by: 0.3}
  - id: tuned
    text: FedProx is no worse.
    kind: not_worse
    better: fedprox
    than: fedavg
    where: {partitioning.alpha: [0.1, 10]}
hydra:
  sweeper:
    params:
      baseline: none,fedavg
      seed: range(3)
"""


def keep(root: Path, accuracies: Sequence[float], *line: str) -> None:
    """Stored runs of a line, one a seed, as ``train`` would write their configs."""
    with Composer(Path("my_conf")) as composer:
        composed = composer.compose(["experiment=study", *line])
    left_out = ("merging", "baseline", "tuned", "claims")
    config = {key: value for key, value in composed.config.items() if key not in left_out}
    config["method"] = composed.config[composed.method_key] | {"name": composed.method_name, "moves_raw_data": False}
    for seed, accuracy in enumerate(accuracies):
        name = "-".join([composed.method_name, *line, str(seed)]).replace("=", "").replace(".", "")
        write(root / "runs" / name.replace("-", "_"), [accuracy], f"split{seed}")
        text = yaml.safe_dump(config | {"seed": seed, "overrides": "…", "digest": name})
        (root / "runs" / name.replace("-", "_") / "config.yaml").write_text(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a preset and runs of it: Feddle .2 above FedAvg, FedProx as good as it at one skew."""
    root = tmp_path_factory.mktemp("claims")
    (root / "my_conf" / "experiment").mkdir(parents=True)
    (root / "my_conf" / "experiment" / "study.yaml").write_text(PRESET)
    before = Path.cwd()
    os.chdir(root)
    try:
        keep(root / "outputs", [0.69, 0.50, 0.61])
        keep(root / "outputs", [0.50, 0.30, 0.40], "baseline=fedavg")
        keep(root / "outputs", [0.50, 0.30, 0.40], "baseline=fedprox")
        # none of the preset's: other rounds, another rate
        keep(root / "outputs", [0.1, 0.1, 0.1], "baseline=fedavg", "rounds=7")
        keep(root / "outputs", [0.1, 0.1, 0.1], "baseline=fedprox", "client_optimizer.lr=0.1")
    finally:
        os.chdir(before)
    return root


@pytest.fixture(scope="module")
def composed() -> dict[Any, Any]:
    """What was composed for the preset of ``place``, which many tests ask for again."""
    return {}


@pytest.fixture(autouse=True)
def _remember(request: pytest.FixtureRequest, composed: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if "place" not in request.fixturenames:
        return
    compose = Composer.compose

    def remembered(composer: Composer, overrides: Sequence[str]) -> Any:
        if tuple(overrides) not in composed:
            composed[tuple(overrides)] = compose(composer, overrides)
        return composed[tuple(overrides)]

    monkeypatch.setattr(Composer, "compose", remembered)


def claims(place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Answer:
    monkeypatch.chdir(place)
    return call("claims", "--config-dir", "my_conf", *arguments)


def test_the_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = claims(place, monkeypatch, "study")
    assert answer.status == 0
    table = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert table[2:7] == [
        "good – accuracy: feddle − fedavg > 0 +20.0 [+17.5, +22.5] 3 held",
        "bad – accuracy: feddle − fedavg > +30.0 +20.0 [+17.5, +22.5] 3 failed",
        "tuned all of 2 cells accuracy: fedprox − fedavg ≥ 0 missing",
        "partitioning.alpha=0.1 +0.0 [+0.0, +0.0] 3 held",
        "partitioning.alpha=10 no run of fedprox or fedavg missing",
    ]
    assert "bad: Feddle is much better." in table
    assert table[-1] == (
        "hybridfl train -m --config-dir my_conf experiment=study partitioning.alpha=10 baseline=fedprox,fedavg seed=0,1,2"
    )


def test_as_json_and_strict(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = claims(place, monkeypatch, "study", "--json", "--strict", "--confidence", "0.9")
    assert answer.status == 1
    (report,) = json.loads(answer.out)
    assert (report["preset"], report["confidence"], report["interval"], report["holm"]) == ("study", 0.9, "t", False)
    good, bad, tuned = report["claims"]
    assert [one["verdict"] for one in (good, bad, tuned)] == ["held", "failed", "missing"]
    (cell,) = good["found"]
    # t(.95, 2) = 2.919986
    assert (cell["mean"], cell["low"]) == pytest.approx((0.2, 0.2 - 2.919986 * 0.01 / math.sqrt(3)), abs=1e-6)
    assert (cell["seeds"], cell["margin"], bad["found"][0]["margin"]) == (3, 0.0, 0.3)
    assert [cell["where"] for cell in tuned["found"]] == [{"partitioning.alpha": "0.1"}, {"partitioning.alpha": "10"}]
    assert tuned["found"][1]["low"] is None
    assert (good["commands"], len(tuned["commands"])) == ([], 1)


def test_strict_is_content_when_all_are_held(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = "claims=[{id: good, text: a, better: feddle, than: fedavg}]"
    assert claims(place, monkeypatch, "study", kept, "--strict").status == 0


@pytest.mark.parametrize(
    ("form", "line"),
    [
        # the lowest and highest of 27 resamples have 1/27 each
        ("markdown", "| good | – | accuracy: feddle − fedavg | > 0 | +20.0 [+19.0, +21.0] | 3 | **held** |"),
        # three cells are decided at once: t(1 - .05 / 6, 2) = 7.648813
        ("latex", r"    good & -- & accuracy: feddle $-$ fedavg & $>$ 0 & +20.0 [+15.6, +24.4] & 3 & \textbf{held} \\"),
    ],
)
def test_formats_and_intervals(place: Path, monkeypatch: pytest.MonkeyPatch, form: str, line: str) -> None:
    how = ["--interval", "bootstrap"] if form == "markdown" else ["--holm"]
    answer = claims(place, monkeypatch, "study", "--format", form, *how)
    assert line in answer.out.splitlines()
    assert ("95 % bootstrap interval" in answer.out) == (form == "markdown")
    assert ("(Holm)" in answer.out) == (form == "latex")
    assert ("hybridfl train" in answer.out) == (form == "markdown")


def study(*swept: dict[str, str], fixed: tuple[str, ...] = ("experiment=study",)) -> Study:
    return Study("study", (), fixed, swept or ({},), "0,1", "feddle", Path("outputs"))


def test_the_cells_of_a_claim_are_its_own_in_those_of_the_sweep() -> None:
    swept = study({"partitioning": "iid", "model": "mlp"}, {"partitioning": "shards", "model": "mlp"})
    assert swept.cells(claim()) == [
        {"partitioning": "iid", "model": "mlp"},
        {"partitioning": "shards", "model": "mlp"},
    ]
    # what is named is not swept
    assert swept.cells(claim(where={"partitioning": "classes"})) == [{"model": "mlp", "partitioning": "classes"}]
    assert study().cells(claim(where={"clients.delay": [0, 4], "tasks.mask": False})) == [
        {"clients.delay": "0", "tasks.mask": "false"},
        {"clients.delay": "4", "tasks.mask": "false"},
    ]
    assert study().cells(claim(where=[{}, {"seed": None}])) == [{}, {"seed": "null"}]


def test_the_line_of_a_method_in_a_cell() -> None:
    one, files = study(fixed=("experiment=study", "rounds=3")), {"fedavg": Path(), "ties": Path()}
    assert one.line("feddle", {}, files) == ("experiment=study", "rounds=3", "baseline=none")
    assert one.line("fedavg", {"rounds": "9"}, files) == ("experiment=study", "baseline=fedavg", "rounds=9")
    assert one.line("lorm", {}, files)[2:] == ("merging=lorm", "baseline=none")


def test_the_study_of_a_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    line = ["rounds=3", "experiment=study", "merging=split_mix", "clients.delay=0,4", "seed=7"]
    with Composer(Path("my_conf")) as composer:
        one = study_of(composer, line)
        swept = study_of(composer, ["experiment=study", "merging=feddle,split_mix", "seed=7,9"])
    assert one.fixed == ("experiment=study", "rounds=3", "merging=split_mix")
    assert (one.swept, one.seeds) == (({"clients.delay": "0"}, {"clients.delay": "4"}), "0,1,2,3,4")
    assert one.line("split_mix", {}, {})[-1] == "baseline=none"
    assert (swept.fixed, swept.swept, swept.seeds) == (("experiment=study",), ({},), "7,9")
    assert swept.line("split_mix", {}, {}) == ("experiment=study", "merging=split_mix", "baseline=none")


def test_overrides_ask_for_runs_that_have_them(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = claims(place, monkeypatch, "study", "rounds=7", "outputs")
    assert answer.status == 0
    assert "no run of feddle " in answer.out
    assert "no run of fedavg" not in answer.out
    assert "hybridfl train -m --config-dir my_conf experiment=study rounds=7 baseline=none" in answer.out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["studdy"], "studdy: is no preset and no folder. Did you mean 'study'?"),
        ([], "preset: none is given, and no sweep there has one. Valid: "),
        (["none"], "experiment=none: lists no claims"),
        (["study", "--format", "tex"], "--format: 'tex' is unknown. Did you mean 'latex'?"),
        (["study", "--interval", "boot"], "--interval: 'boot' is unknown."),
        (["study", "--confidence", "95"], "--confidence: got 95: expected a share"),
        (
            ["study", "claims=[{id: a, text: b, better: feddle, than: fedavgg}]"],
            "claims[0].than: got 'fedavgg', which is no method. Did you mean 'fedavg'?",
        ),
        (
            ["study", "claims=[{id: a, text: b, better: feddle, than: fedavg, where: {partitioning.alfa: 1}}]"],
            "claims[0].where.partitioning.alfa: unknown key. Did you mean 'partitioning.alpha'?",
        ),
        (
            ["study", "claims=[{id: a, text: b, better: feddle, than: fedavg, than_where: {model: mpl}}]"],
            "claims[0].than_where.model: got 'mpl'. Did you mean 'mlp'?",
        ),
        (
            ["study", "claims=[{id: a, text: b, better: feddle, than: fedavg, scope: globl}]"],
            "claims[0].scope: got 'globl', which no run of the claim has. Did you mean 'global'?",
        ),
        (
            [
                "study",
                "claims=[{id: a, text: b, better: feddle, than: fedavg},{id: a, text: b, better: feddle, than: ties}]",
            ],
            "claims[1].id: got 'a', as another claim has",
        ),
    ],
)
def test_what_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str) -> None:
    answer = claims(place, monkeypatch, *arguments)
    assert answer.status == 2
    assert answer.err.startswith(f"hybridfl: {problem}")


def test_the_claims_of_a_sweep_and_of_a_folder_of_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_conf" / "experiment").mkdir(parents=True)
    own = "{id: own, text: two words, better: fedavg, than: fedavg, than_scope: clients}"
    preset = f"# @package _global_\n# One claim.\npartitioning:\n  seed: ${{seed}}\nclaims: [{own}]\n"
    (tmp_path / "my_conf" / "experiment" / "study.yaml").write_text(preset)
    monkeypatch.chdir(tmp_path)
    # a part's seed that is that of the first run by chance, beside one that follows
    line = ("experiment=study", *TINY, "rounds=1", "dataset.seed=0", f"claims=[{own}]")
    sweep = done("-m", "--config-dir", "my_conf", *line, "baseline=fedavg", "seed=0,1")
    (report,) = json.loads(claims(tmp_path, monkeypatch, str(sweep), "--json").out)
    (one,) = report["claims"]
    assert (one["found"][0]["seeds"], one["found"][0]["reason"], one["commands"]) == (2, "", [])
    # the plain preset has 60 rounds, of which there are no runs
    (report,) = json.loads(claims(tmp_path, monkeypatch, "--json").out)
    assert report["claims"][0]["verdict"] == "missing"


CLAIMING = [name for name, file in choices("experiment").items() if "\nclaims:" in file.read_text()]


@pytest.mark.parametrize("name", CLAIMING)
def test_the_claims_of_a_shipped_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    cells = set()
    swept: list[set[str]] = []

    def of(runs: Runs, composer: Composer, line: Sequence[str]) -> list[Run]:
        # Once for all methods of a cell, and not those of the preset's own sweep, which tests/test_preset_sweeps.py composes.
        cell = frozenset(text for text in line if not text.startswith("baseline="))
        swept.extend([] if swept else map(set, composer.expand([f"experiment={name}"])))
        if cell not in cells and not any(cell <= job for job in swept):
            composer.compose(line)
        cells.add(cell)
        return []

    monkeypatch.setattr(Runs, "of", of)
    (report,) = json.loads(call("claims", name, "--json").out)
    assert report["claims"]
    assert cells
    assert {one["verdict"] for one in report["claims"]} == {"missing"}
    assert all(one["commands"] for one in report["claims"])
