"""Labels that the server has, has of its own, or has not."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import cli_helpers
import helpers
import numpy as np
import pytest
from cli_helpers import call, done, rows
from server_data_helpers import OTHER, clients, dataset, draw, servers

from hybridfl.config import choices
from hybridfl.data.dataset import Examples
from hybridfl.data.server_data import NoServerData
from hybridfl.engine import Unsuitable, check_method
from hybridfl.errors import ConfigError
from hybridfl.evaluation import Evaluator
from hybridfl.methods.base import Facts
from hybridfl.methods.oracle import Oracle
from hybridfl.plan import Plan
from hybridfl.types import SERVER


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


# -- labels that the server has, has of its own, or has not ----------------------------------------------------------


KINDS = {
    "labelled": (),
    "unlabelled": ("server_data.labelled=false",),
    "task": (*OTHER, "server_data.classes=[0,1,2]"),
    "own": (*OTHER, "server_data.labels=own"),
    "none": (*OTHER, "server_data.labels=none"),
    "styled": ("server_data=style", "server_data.examples=12"),
    "styled unlabelled": ("server_data=style", "server_data.examples=12", "server_data.labelled=false"),
}
KNOWN = {"labelled", "task", "styled"}
WAYS = {
    "unlabelled": "labelled=true",
    "styled unlabelled": "labelled=true",
    "own": "labels=task",
    "none": "labels=task",
}


@pytest.fixture(scope="module", params=KINDS)
def kind_and_plan(request: pytest.FixtureRequest) -> tuple[str, Plan]:
    options = ("baseline=fedavg", "clients.validation=0.3", "server_data.validation=0.5", *KINDS[request.param])
    return request.param, helpers.plan(*options)


def test_labels_that_nobody_knows_are_out_of_reach(kind_and_plan: tuple[str, Plan]) -> None:
    kind, plan = kind_and_plan
    federation = plan.federation
    labels, own = federation.bench.y.numpy(), servers(plan.drawn)
    assert federation.provides == plan.drawn.provides
    if kind in KNOWN or kind == "own":
        np.testing.assert_array_equal(labels[own], federation.pool.y[own])
        assert labels[own].max() == (4 if kind == "own" else 2)
    else:
        assert (labels[own] == -1).all()
    theirs = clients(plan.drawn)
    np.testing.assert_array_equal(labels[theirs], federation.pool.y[theirs])
    assert (SERVER in federation.labelled) == (kind in KNOWN)
    assert SERVER in federation.participants


# A baseline that has the name of a merging method is that one; tests/test_merging_rounds.py sees to it.
METHOD_LINES = [
    *(f"merging={name}" for name in choices("merging")),
    *(f"baseline={name}" for name in choices("baseline") if name not in {"none", *choices("merging")}),
    *(f"merging=feddle merging.objective={objective}" for objective in ("kd", "head", "entropy", "mix")),
]
CASES = [(line, "unlabelled") for line in METHOD_LINES]
CASES += [(line, kind) for line in ("baseline=server_only", METHOD_LINES[-4]) for kind in ("own", "none")]


@pytest.mark.parametrize(("line", "kind"), CASES)
def test_a_method_is_refused_or_never_reads_the_servers_labels(line: str, kind: str) -> None:
    typed = (*line.split(), "server_data.validation=0.25", "rounds=2", "client_optimizer.epochs=1", *KINDS[kind])
    try:
        plan = helpers.plan(*typed)
    except Unsuitable as refusal:
        method = helpers.plan(*line.split()).method
        assert method.requires >= {"server_labels"}
        name = line.split()[0]
        hint = f"{name} requires server_labels, which is not there; try server_data.{WAYS[kind]}"
        if other := getattr(method, "instead", {}).get("server_labels"):
            hint += f", or {name.partition('=')[0]}={other}, which does without"
        assert str(refusal) == f"server_data: {hint}."
        return
    own = servers(plan.drawn)
    pool = plan.federation.pool
    others = pool.y.copy()
    others[own] = (others[own] + 1) % 5
    swapped = dataclasses.replace(plan.federation, pool=Examples(pool.x, others, pool.domain))
    states = [
        helpers.snapshots(dataclasses.replace(plan, federation=federation).engine())[-1].state
        for federation in (plan.federation, swapped)
    ]
    assert helpers.identical(*states)


def test_the_oracle_pools_what_has_labels_of_the_task(kind_and_plan: tuple[str, Plan]) -> None:
    kind, plan = kind_and_plan
    everybody = Oracle().init(plan.federation)["everybody"]
    assert everybody == ([0, 1, 2, 3, 4, SERVER] if kind in KNOWN else [0, 1, 2, 3, 4])


def test_validation_is_the_servers_only_if_it_has_labels_of_the_task(kind_and_plan: tuple[str, Plan]) -> None:
    kind, plan = kind_and_plan
    split = plan.federation.split
    evaluator = Evaluator(plan.federation, plan.method, plan.settings.evaluation)
    found = {row["scope"]: row for row in evaluator.score(plan.method.init(plan.federation), 1, True).rows}
    theirs = np.concatenate(split.clients_val)
    assert 0 < len(split.server_val) < len(theirs)
    assert found["validation"]["examples"] == (len(split.server_val) if kind in KNOWN else len(theirs))


@pytest.mark.parametrize("kind", ["unlabelled", "own"])
def test_a_start_on_the_server_needs_labels(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        helpers.plan("baseline=fedavg", "start=server", *KINDS[kind])
    problem = f"got server, but the server owns no labelled examples; try server_data.{WAYS[kind]}."
    assert (caught.value.key, caught.value.problem) == ("start", problem)


@pytest.mark.parametrize(
    ("requires", "options", "hint"),
    [
        ({"server_data", "server_labels"}, ("server_data=none",), "server_data=share"),
        ({"server_labels"}, ("server_data.labelled=false",), "server_data.labelled=true"),
        ({"server_labels"}, (*OTHER, "server_data.labels=own"), "server_data.labels=task"),
        ({"server_own_labels"}, ("server_data=none",), "server_data=dataset server_data.labels=own"),
        ({"server_data", "server_own_labels"}, ("server_data=none",), "server_data=dataset server_data.labels=own"),
        ({"server_own_labels"}, (*OTHER, "server_data.labels=none"), "server_data=dataset server_data.labels=own"),
    ],
)
def test_the_hint_of_a_refusal_gives_what_is_missing(requires: set[str], options: Any, hint: str) -> None:
    plan = helpers.plan("baseline=fedavg", *options)
    method = Facts()
    method.requires = frozenset(requires)
    labels_by = getattr(plan.settings.server_data, "labels_by", "server_data=share")
    with pytest.raises(Unsuitable) as caught:
        check_method(method, plan.federation, "star", "baseline=mine", labels_by)  # type: ignore[arg-type]
    assert caught.value.problem.endswith(f"; try {hint}.")
    assert caught.value.key == "server_data"


def test_a_method_that_wants_something_else_gets_no_such_hint() -> None:
    method = Facts()
    method.requires = frozenset({"public_key"})
    with pytest.raises(Unsuitable, match=r"requires public_key, which is not there\.$"):
        check_method(method, helpers.plan("baseline=fedavg").federation, "star", "m")  # type: ignore[arg-type]


def test_a_sweep_skips_what_needs_labels_and_says_how_it_could_have_them() -> None:
    line = (*cli_helpers.TINY, "server_data.labelled=false", "merging.objective=kd")
    answer = call("train", "-m", *line, "baseline=none,server_only,data_sharing")
    assert answer.status == 0, answer.both
    jobs = rows(answer.folder / "runs.csv")
    assert [job["status"] for job in jobs] == ["done", "skipped", "skipped"]
    skipped = [text for text in answer.both.splitlines() if text.startswith("skipped: ")]
    for name, text in zip(("server_only", "data_sharing"), skipped, strict=True):
        reason = f"baseline={name} requires server_labels, which is not there; try server_data.labelled=true."
        assert text.endswith(f"server_data: {reason}")


def test_nothing_provides_nothing() -> None:
    assert NoServerData().provides == frozenset()
    drawn = draw(dataset(), NoServerData())
    assert len(servers(drawn)) == 0
    assert drawn.provides == frozenset()


# -- tables ----------------------------------------------------------------------------------------------------------


def cells(text: str) -> dict[str, list[str]]:
    found = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return {owner: rest for owner, *rest in found}


TINY_OTHER = tuple(text.replace("[1,4,4]", "[1,8,8]") for text in OTHER)


@pytest.mark.parametrize(
    ("command", "classes"), [(("split",), 10), (("split",), 30), (("train", "--dry-run", "baseline=fedavg"), 10)]
)
@pytest.mark.parametrize(
    ("options", "owner", "origin", "counts"),
    [
        (("server_data.labelled=false",), "server (unlabelled)", None, None),
        ((*TINY_OTHER, "server_data.labels=own"), "server (own labels)", "synthetic", None),
        (TINY_OTHER, "server", "synthetic", [4] * 5),
        (("server_data=style", "server_data.examples=40"), "server", "synthetic (blur)", "balanced"),
    ],
)
def test_the_table_says_what_is_known_and_where_it_comes_from(
    command: tuple[str, ...], classes: int, options: tuple[str, ...], owner: str, origin: str | None, counts: Any
) -> None:
    answer = call(*command, *cli_helpers.TINY, f"dataset.classes={classes}", *options)
    assert answer.status == 0, answer.both
    table = cells(answer.out)
    assert [name for name in table if name.startswith("server")] == [owner]
    row = table[owner]
    if origin is not None:
        assert row.pop(0) == origin
        assert table["0"].pop(0) == "synthetic"
    number = 20 if options[: len(TINY_OTHER)] == TINY_OTHER else 40
    assert row[:3] == [str(number), "·", "100"]
    if counts is None:
        assert set(row[3:]) == {""}
    elif classes > 20:
        assert row[3] == ("5" if counts != "balanced" else "30")
    else:
        counts = [4] * 10 if counts == "balanced" else counts + [0] * 5
        assert row[3:] == [str(n) if n else "·" for n in counts]
    if command == ("split",):
        (told,) = (line for line in answer.out.splitlines() if line.startswith("examples   "))
        assert ("that only it has" in told) == (origin is not None)
        assert ("unlabelled" in told, "own labels" in told) == ("unlabelled" in owner, "own" in owner)


def test_a_comparison_tells_two_kinds_of_server_data_apart() -> None:
    for line in (TINY_OTHER, ("server_data=style",)):
        done(*cli_helpers.TINY, "baseline=fedavg", "rounds=1", *line)
    answer = call("compare", "--format", "csv")
    assert answer.status == 0, answer.both
    found = list(csv.DictReader(io.StringIO(answer.out)))
    assert sorted(row["server_data"] for row in found) == ["OtherDataset", "Styled"]
