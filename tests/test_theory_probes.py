"""The theory probes: their arithmetic against numpy, and that looking at a run does not change it."""

from __future__ import annotations

import copy
import csv
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import identical
from matplotlib.figure import Figure

from hybridfl import params as P
from hybridfl.config import GROUPS
from hybridfl.merging import spans as S
from hybridfl.plan import Plan, make_plan
from hybridfl.statistics import power_law, rank_correlation, rounds_ratio
from hybridfl.types import SERVER, View

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

from theory import command, measures, traces, watching  # noqa: E402
from theory.levels import FULL, TOY, Levels, Line  # noqa: E402
from theory.probes import PROBES  # noqa: E402
from theory.search import Search  # noqa: E402

LATE = ("clients.delay=3", "merging.search.steps=3", "rounds=4")


def vectors(number: int, size: int = 12, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randn(number, size, generator=rng, dtype=torch.float64))


def shadow(anchors: Sequence[torch.Tensor], v: torch.Tensor) -> np.ndarray:
    """P v by numpy's least squares."""
    a = torch.stack(list(anchors)).numpy().T
    return a @ np.linalg.lstsq(a, v.numpy(), rcond=None)[0]


# -- spans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 4, 12])
def test_what_a_span_captures_is_what_least_squares_leaves(number: int) -> None:
    *anchors, g, f = vectors(number + 2)
    rows, inside = S.basis(anchors), shadow(anchors, g)
    assert S.captured(rows, g) == pytest.approx(inside @ inside / (g @ g).item(), rel=1e-10)
    other = shadow(anchors, f)
    cosine = inside @ other / np.linalg.norm(inside) / np.linalg.norm(other)
    assert S.surrogate_gap(rows, f, g) == pytest.approx(1 - cosine, rel=1e-10)
    assert S.cosine(f, g) == pytest.approx(np.corrcoef(f - f.mean(), g - g.mean())[0, 1], abs=0.5)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-12)


def test_repeated_scaled_and_zero_anchors_add_nothing() -> None:
    a, b, g = vectors(3)
    for anchors in ([a, b, a], [a, -3 * b, torch.zeros_like(a)], [1e3 * a, b, a + b]):
        rows = S.basis(anchors)
        assert len(rows) == 2
        assert S.captured(rows, g) == pytest.approx(S.captured(S.basis([a, b]), g), rel=1e-9)
    assert len(S.basis([a.float(), a.float() * 3])) == 1
    nothing = S.basis([torch.zeros_like(a)])
    assert (len(nothing), S.captured(nothing, g), S.captured(S.basis([a]), torch.zeros_like(a))) == (0, 0, 0)
    assert S.surrogate_gap(S.basis([a]), g * 0, g) == 1


def test_a_span_captures_at_least_what_any_of_its_vectors_does() -> None:
    *anchors, g = vectors(6)
    rows, mean = S.basis(anchors), torch.stack(anchors).mean(0)
    assert S.captured(rows, g) > S.cosine(mean, g) ** 2 > 0
    assert S.captured(S.basis([mean]), g) == pytest.approx(S.cosine(mean, g) ** 2)
    assert S.captured(rows, mean) == pytest.approx(1)
    x, y = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])
    assert S.cosine(x, y) == pytest.approx(0.6)
    assert S.captured(S.basis([x]), y) == pytest.approx(0.36)


def test_a_span_needs_a_vector_and_a_length() -> None:
    (g,) = vectors(1)
    with pytest.raises(ValueError, match="at least one vector"):
        S.basis([])
    with pytest.raises(ValueError, match="length: got 0: must be positive"):
        S.errors([g], g, 0.0)


# -- variances ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 5])
def test_the_variance_of_a_merge_is_the_squared_length_of_its_error(number: int) -> None:
    *e, g = vectors(number + 1)
    eta, c = 0.3, np.linspace(-0.5, 1, number)
    anchors = [-eta * (g + error) for error in e]
    found = S.errors(anchors, g, eta)
    assert torch.allclose(found, torch.stack(e), atol=1e-12, rtol=0)
    sigma = S.second_moment(found)
    merged = c @ torch.stack(e).numpy()
    assert S.variance(sigma, torch.from_numpy(c)) == pytest.approx(merged @ merged, rel=1e-10)
    assert S.of_the_mean(sigma) == pytest.approx(torch.stack(e).mean(0).square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("number", [1, 2, 6])
def test_the_least_variance_is_that_of_the_inverse(number: int) -> None:
    e = torch.stack(vectors(number))
    sigma = (e @ e.T).numpy()
    inverse = np.linalg.inv(sigma)
    least, c = S.least_variance(torch.from_numpy(sigma))
    assert least == pytest.approx(1 / inverse.sum(), rel=1e-9)
    np.testing.assert_allclose(c, inverse.sum(1) / inverse.sum(), rtol=1e-7, atol=1e-9)


def test_better_anchors_get_more_and_errors_of_few_dimensions_cancel() -> None:
    least, c = S.least_variance(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)))
    np.testing.assert_allclose(c, np.array([4, 2, 1]) / 7, atol=1e-12)
    assert least == pytest.approx(4 / 7)
    one_way = torch.tensor([[1.0], [3.0]], dtype=torch.float64)  # e_2 = 3 e_1: 3/2 of the first minus 1/2 of the second
    least, c = S.least_variance(one_way @ one_way.T)
    np.testing.assert_allclose(c, [1.5, -0.5], atol=1e-9)
    assert least == pytest.approx(0, abs=1e-12)
    alike = torch.full((4, 4), 0.2, dtype=torch.float64) + torch.eye(4, dtype=torch.float64)
    assert S.least_variance(alike)[0] == pytest.approx(S.of_the_mean(alike))


# -- ratios and exponents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([2, 4], [6, 6], (0.5, "")),
        ([2, 4], [6, None], (3 / 8, "<")),
        ([None, 5], [5, 5], (7.5 / 5, ">")),
        ([None], [None], (1.0, "?")),
    ],
)
def test_a_run_that_never_arrives_bounds_the_ratio(ours, theirs, expected) -> None:
    assert rounds_ratio(ours, theirs, 10) == expected


def test_no_runs_have_no_ratio() -> None:
    ratio, bound = rounds_ratio([], [3], 10)
    assert (math.isnan(ratio), bound) == (True, "?")


def test_exponents_and_rank_correlations_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.lognormal(size=20), rng.lognormal(size=20)
    assert power_law(x, 3 * x**0.5) == pytest.approx(0.5)
    assert power_law(x, y) == pytest.approx(np.polyfit(np.log(x), np.log(y), 1)[0])
    assert power_law([0, *x], [1, *y]) == pytest.approx(power_law(x, y))
    assert math.isnan(power_law([2, 2], [1, 3]))
    ranks = [np.argsort(np.argsort(side)) for side in (x, y)]
    assert rank_correlation(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation([1, 2, 3, 4], [7, 8, 8, 9]) == pytest.approx(
        np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1]
    )
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))
    assert math.isnan(rank_correlation([1], [2]))


# -- looking at a run --------------------------------------------------------------------------------------------------


def planned(*overrides: str) -> Plan:
    """The plan of the tiny run. Single keys are set after Hydra composed the groups, which takes it longer than the run."""
    groups = tuple(text for text in overrides if "." not in text.split("=")[0] and text.split("=")[0] in GROUPS)
    composed = helpers._composed(*helpers.TINY, *groups)
    config = copy.deepcopy(composed.config)
    for text in (*LATE, *overrides):
        if text not in groups:
            key, _, value = text.partition("=")
            *path, last = key.split(".")
            node = functools.reduce(dict.__getitem__, path, config)
            assert last in node
            node[last] = yaml.safe_load(value)
    return make_plan(replace(composed, config=config), helpers.CACHE)


@functools.cache
def moments(*overrides: str) -> tuple[watching.Moment, ...]:
    return tuple(watching.watched(planned(*overrides)))


def test_to_look_at_a_run_does_not_change_its_numbers() -> None:
    for case in (["merging.objective=kd"], ["merging.objective=head", "clients.noisy_labels=0.4"]):
        watched, plain = planned(*case), planned(*case)
        expected = helpers.snapshots(helpers.engine_of(plain))
        state = torch.random.get_rng_state()
        for moment, snapshot in zip(watching.watched(watched), expected[1:], strict=True):
            traces.of_the_round(moment)
            traces.coefficients(moment)
            assert identical(moment.after.state, snapshot.state)
            assert moment.after.costs == snapshot.costs
        assert torch.equal(state, torch.random.get_rng_state())


def test_the_gradient_is_that_of_the_pooled_clients_with_true_labels() -> None:
    moment = moments("clients.noisy_labels=0.4")[2]
    federation = moment.plan.federation
    rows = np.concatenate([federation.owned(client) for client in range(5)])
    labels = torch.from_numpy(federation.pool.y[rows])
    assert not torch.equal(labels, federation.bench.y[rows])
    params = {name: t.clone().requires_grad_() for name, t in moment.model.params.items()}
    logits = torch.func.functional_call(federation.net, params, (federation.bench.x[rows],))
    expected = torch.autograd.grad(F.cross_entropy(logits, labels), list(params.values()))
    flat = torch.cat([g.flatten() for g in expected])
    assert torch.allclose(moment.clients_gradient, flat, atol=1e-12, rtol=0)
    assert identical(moment.model, moment.before.state["global"])


@pytest.mark.parametrize("objective", ["ce", "kd", "head"])
def test_the_surrogates_gradient_is_that_of_the_search(objective: str) -> None:
    moment = moments(f"merging.objective={objective}")[2]
    federation, params = moment.plan.federation, {n: t.clone() for n, t in moment.model.params.items()}
    rows = federation.rows(SERVER, View())
    x, y = federation.bench.x[rows], federation.bench.y[rows]
    own = moment.before.state["head"]
    assert bool(own) == (objective == "head")
    leaves = {name: t.requires_grad_() for name, t in (params | own).items()}
    logits = torch.func.functional_call(federation.net, leaves, (x,))
    loss = F.cross_entropy(logits, y)
    if objective == "kd":
        assert len(on_time(moment)) < len(moment.arrivals) == 3
        teachers = [
            torch.func.functional_call(federation.net, P.add(start, update), (x,))
            for start, update in (
                (moment.starts[e["birth"]].params, moment_layout(moment).unflatten(e["update"]))
                for e in moment.arrivals
            )
        ]
        target = torch.stack(teachers).mean(0).softmax(1)
        loss = (target * (target.log() - logits.log_softmax(1))).sum(1).mean().requires_grad_()
    wanted = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    flat = torch.cat([(wanted[n] * (n not in own)).flatten() for n in moment.model.params])
    assert torch.allclose(moment.surrogate_gradient, flat, atol=1e-12, rtol=0)
    assert flat.abs().max() > 1e-4


def on_time(moment: watching.Moment) -> list[int]:
    """Births of arrivals that were born in the same round."""
    return [e["birth"] for e in moment.arrivals if e["birth"] == moment.index]


def moment_layout(moment: watching.Moment) -> P.Layout:
    return P.Layout.of(moment.model.params)


def test_numbers_of_a_round_are_those_of_its_merge() -> None:
    # Without a search the merge is the mean of what arrived: its variance is the mean's.
    for moment in moments("merging.search.steps=0", "merging.norm=none"):
        row = traces.of_the_round(moment)
        assert row["variance_merge"] == pytest.approx(row["variance_mean"], rel=1e-9)
        assert row["variance_best_atlas"] <= row["variance_best_arrivals"] * (1 + 1e-9) <= row["variance_mean"]
        assert row["captured"] >= row["cos2_mean"] * (1 - 1e-9)
        assert row["cos2_merge"] == pytest.approx(row["cos2_mean"], rel=1e-9)
        assert row["anchors"] == len(moment.after.state["atlas"])
    assert moment.work_length == pytest.approx(
        0.1 * np.mean([2 * math.ceil(len(moment.plan.federation.owned(k)) / 8) for k in range(5)])
    )
    searched = [traces.of_the_round(moment) for moment in moments()]
    for quantity in ("variance", "cos2"):
        assert any(row[f"{quantity}_merge"] != pytest.approx(row[f"{quantity}_mean"], rel=1e-3) for row in searched)
    assert all(row["captured"] >= row["cos2_merge"] * (1 - 1e-9) for row in searched)


def test_coefficients_are_those_that_were_reported() -> None:
    for moment in moments("clients.noisy_labels=0.4"):
        reported = [(who, value) for name, who, value in moment.record.reports if name == "coefficient"]
        rows = traces.coefficients(moment)
        assert [row["client"] for row in rows] == [who for who, _ in reported]
        told = [value * len(moment.arrivals) for _, value in reported]
        assert [row["coefficient"] for row in rows] == pytest.approx(told)
        assert {row["client"] for row in rows if row["noisy"]} <= set(moment.plan.federation.noisy_clients)
        assert all(row["staleness"] >= 0 for row in rows)
        assert [row["fresh"] for row in rows] == [e["added"] == moment.index for e in moment.entries]
    # One of the last round's arrivals is late, and told so.
    late = [e["birth"] for e in moment.arrivals if e["birth"] < moment.index]
    assert late and sorted(3 - row["staleness"] for row in rows if row["fresh"]) == sorted([*late, *on_time(moment)])


def test_a_search_keeps_the_sum_and_lowers_its_loss() -> None:
    moment = moments()[3]
    federation = moment.plan.federation
    x, y = federation.test
    search = Search(moment, moment.entries, steps=30)
    c = search.found(x, y, 0.0)
    assert c.sum().item() == pytest.approx(1)
    assert search.loss(c, x, y) < search.loss(search.default, x, y)
    assert (search.found(x, y, 1e6) - search.default).abs().max() < (c - search.default).abs().max() / 10
    # The default itself is the mean of the arrivals, brought to the atlas's mean length.
    lengths = [float(e["update"].norm()) for e in moment.entries]
    step = torch.stack([e["update"] / e["update"].norm() for e in moment.arrivals]).mean(0) * np.mean(lengths)
    assert torch.allclose(search.default[:, 0] @ search.anchors, step)


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Levels:
    """Toy sizes on the tiny federation; to compose the preset's config takes longer than such a run does."""

    def plan(self: traces.Lab, line: Line, seed: int, rounds: int) -> Plan:
        return planned("merging.search.steps=1", f"seed={seed}", f"rounds={rounds}", *line)

    monkeypatch.setattr(traces.Lab, "plan", plan)
    varied = {"alphas": (2.0,), "delays": (4.0,), "cohorts": (2, 5), "sizes": (3, 5), "objectives": ("ce", "kd")}
    levels = replace(TOY, rounds=2, short=2, moments=(2,), examples=(5, 20), owned=30, pairs={"same": ()}, **varied)
    monkeypatch.setattr(command, "TOY", levels)
    return levels


def test_every_probe_is_measured_told_and_drawn(tiny: Levels, capsys: pytest.CaptureFixture[str]) -> None:
    lab = traces.Lab(tiny, [1])
    found = {name: probe.measure(lab) for name, probe in PROBES.items()}
    for name, probe in PROBES.items():
        columns, *lines = probe.tell(found[name], tiny)
        assert lines and all(len(line) == len(columns) for line in lines)
        probe.draw(found[name], tiny, Figure().add_subplot())
        assert {row["seed"] for row in found[name]} == {1}
    assert len(found["T1"]) == 2 * 2
    assert {(row["alpha"], row["size"]) for row in found["T1"]} == {(2.0, 3), (2.0, 5)}
    assert {row["method"] for row in found["T3"]} == set(measures.METHODS)
    assert {(row["anchors"], row["examples"]) for row in found["T4"]} > {(3, 5), (3, 20)}
    assert any(row["noisy"] for row in found["T6"])
    # Every run once, whichever probes ask for it.
    assert capsys.readouterr().err.count(" rounds=2") == len(lab.traces) == 2 + 4 + 5 + 2


def test_the_script_writes_every_number_and_a_figure(
    tiny: Levels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = command.study(["--quick", "--probes", "T4", "--output-dir", str(tmp_path)])
    assert sorted(path.name for path in folder.iterdir()) == ["T4.csv", "T4.png", "about.json"]
    with (folder / "T4.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        gain, possible, excess = (float(row[name]) for name in ("gain", "possible_gain", "excess"))
        assert gain + excess == pytest.approx(possible)
    shown = capsys.readouterr().out
    assert "T4: excess loss" in shown and "1 seed" in shown and "expected: grows like" in shown


def test_a_line_of_the_study_is_a_run_of_the_preset() -> None:
    lab = traces.Lab(FULL, [0], ("merging.objective=kd",))
    plan = lab.plan((*FULL.pairs["rotated 90"], *measures.setting("m", 10)), seed=3, rounds=7)
    clients = plan.federation.clients
    assert (plan.settings.seed, plan.settings.rounds, clients.delay, clients.per_round) == (3, 7, 4, 10)
    assert (plan.method.objective, plan.settings.server_data.style) == ("kd", "rotate")
    for factor, own in measures.OWN.items():
        key = measures.KEYS[factor].split(".")
        assert measures.setting(factor, own) == ()
        node = lab.composed[next(iter(lab.composed))].config[key[0]]
        assert factor == "m" or node[key[1]] == own
