"""Scores by domain, and runs with domains from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cli_helpers
import helpers
import numpy as np
import pytest
import torch
from cli_helpers import call, done, rows, tables
from matplotlib.image import imread

from hybridfl.evaluation import Evaluation, Evaluator
from hybridfl.executors import sequential
from hybridfl.local import Outcome, Task, Workbench, run_task
from hybridfl.methods.base import Facts
from hybridfl.plan import Plan
from hybridfl.types import SERVER, Model, Served


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


# -- scores ----------------------------------------------------------------------------------------------------------


TWO = (
    "dataset=domains",
    "+dataset@dataset.sets.more=digits",
    "dataset.size=4",
    "dataset.channels=1",
    "dataset.limit=60",
    "dataset.invert=[more]",
    "partitioning=domains",
    "model.hidden=[]",
    "baseline=fedavg",
)


class Deployed(Facts):
    """Serves what it is told, by participant."""

    def __init__(self, served: dict[int, list[Served]]) -> None:
        self.served = served

    def serve(self, state: Any, participant: int) -> list[Served]:
        return self.served.get(participant, [])


@pytest.fixture(scope="module")
def plan() -> Plan:
    return helpers.plan(*TWO)


def constant(plan: Plan, label: int) -> list[Served]:
    """A net that always says this class, with logits 1 and nine times 0."""
    params = {name: torch.zeros_like(tensor) for name, tensor in plan.federation.start.params.items()}
    params["head.bias"][label] = 1
    return [Served(Model(params, {}))]


def scores(plan: Plan, served: dict[int, list[Served]]) -> dict[str, dict[str, Any]]:
    method: Any = Deployed(served)
    found = Evaluator(plan.federation, method, Evaluation()).score({}, 1, True)
    return {row["scope"]: row for row in found.rows}


def test_scopes_by_domain_of_a_global_model(plan: Plan) -> None:
    federation = plan.federation
    test, own = federation.dataset.test, federation.split.clients_test
    found = scores(plan, dict.fromkeys((SERVER, *range(5)), constant(plan, 3)))
    assert list(found) == [
        *("global", "global/domain=digits", "global/domain=more"),
        *("clients", "clients/domain=digits", "clients/domain=more"),
        *("served", "served/domain=digits", "served/domain=more"),
    ]
    for d, name in enumerate(("digits", "more")):
        inside = test.domain == d
        row = found[f"global/domain={name}"]
        right = float((test.y[inside] == 3).mean())
        assert (row["examples"], row["accuracy"]) == (445, pytest.approx(right))
        assert row["loss"] == pytest.approx(np.log(np.e + 9) - right)
        assert found[f"served/domain={name}"]["accuracy"] == pytest.approx(right)
        theirs = [index for index in own if test.domain[index[0]] == d]
        assert len(theirs) == (3, 2)[d]
        each = [(test.y[index] == 3).mean() for index in theirs]
        row = found[f"clients/domain={name}"]
        assert row["accuracy"] == pytest.approx(np.mean(each))
        assert row["worst10"] == pytest.approx(min(each))
        assert row["spread"] == pytest.approx(np.std(each))
        assert row["examples"] == sum(map(len, theirs))


def test_scopes_by_domain_of_personal_models(plan: Plan) -> None:
    """A net of their own for each client, so that the client's examples alone are run; and one client serves nothing."""
    federation = plan.federation
    test, own = federation.dataset.test, federation.split.clients_test
    found = scores(plan, {k: constant(plan, k) for k in range(4)})
    each = [(test.y[own[k]] == k).mean() for k in range(4)]
    assert found["clients/domain=digits"]["accuracy"] == pytest.approx(np.mean(each[:3]))
    assert found["clients/domain=more"]["accuracy"] == pytest.approx(each[3])
    inside = test.domain == 1
    assert found["served/domain=more"]["accuracy"] == pytest.approx(
        np.mean([(test.y[inside] == k).mean() for k in range(4)])
    )
    assert "global" not in found


def test_clients_of_several_domains_count_in_each_with_their_part_of_it() -> None:
    plan = helpers.plan(*(text for text in TWO if text != "partitioning=domains"), "partitioning=iid")
    test, own = plan.federation.dataset.test, plan.federation.split.clients_test
    found = scores(plan, {k: constant(plan, k) for k in range(5)})
    for d, name in enumerate(("digits", "more")):
        parts = [index[test.domain[index] == d] for index in own]
        assert all(0 < len(part) < len(index) for part, index in zip(parts, own, strict=True))
        each = [(test.y[part] == k).mean() for k, part in enumerate(parts)]
        assert found[f"clients/domain={name}"]["accuracy"] == pytest.approx(np.mean(each))
        assert found[f"clients/domain={name}"]["examples"] == sum(map(len, parts))


def test_a_domain_of_the_servers_alone_is_scored_apart() -> None:
    server = ("server_data=domains", "server_data.domains=[digits]", "server_data.examples=12")
    plan = helpers.plan(*TWO, *server)
    test = plan.federation.dataset.test
    found = scores(plan, dict.fromkeys((SERVER, *range(5)), constant(plan, 3)))
    in_more, in_digits = ((test.y[test.domain == d] == 3).mean() for d in (1, 0))
    assert found["global"] == found["global/domain=more"] | {"scope": "global"}
    assert found["served"] == found["served/domain=more"] | {"scope": "served"}
    assert found["global"]["examples"] == 445
    assert found["global"]["accuracy"] == pytest.approx(in_more)
    assert found["global/domain=digits"]["accuracy"] == pytest.approx(in_digits)
    assert "clients/domain=digits" not in found


def test_one_domain_has_no_scopes_of_its_own() -> None:
    plan = helpers.plan(*(text for text in TWO if "more" not in text))
    assert list(scores(plan, {SERVER: constant(plan, 0)})) == ["global"]


# -- from the command line -------------------------------------------------------------------------------------------


SMALL = (
    "dataset=domains",
    "+dataset@dataset.sets.more=digits",
    "dataset.size=6",
    "dataset.channels=1",
    "dataset.limit=80",
    "partitioning=domains",
    *cli_helpers.SMALL_WORK,
)
SERVER_DATA = {
    "domains": ("server_data=domains", "server_data.domains=[more]"),
    "style": ("server_data=style", "server_data.style=noise"),
    "dataset": (
        "server_data=dataset",
        "dataset@server_data.dataset=digits",
        "server_data.invert=true",
        "server_data.labels=none",
        "merging.objective=kd",
    ),
}


@pytest.mark.parametrize("kind", SERVER_DATA)
def test_an_interrupted_run_continues_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    line = (*SMALL, *SERVER_DATA[kind], "ui=none", "executor=sequential")
    once = done(*line, "output_dir=once")
    assert any(row["scope"] == "global/domain=more" for row in rows(once / "metrics.csv"))

    def stopped(bench: Workbench, task: Task) -> Outcome:
        if task.round == 2:
            raise KeyboardInterrupt
        return run_task(bench, task)

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "run_task", stopped)
        assert call("train", *line).status == 130
    run = done(*line)
    assert "continues after round 2" in (run / "log.txt").read_text()
    assert tables(run) == tables(once)
    assert (run / "split.json").read_bytes() == (once / "split.json").read_bytes()


def test_the_split_of_two_domains_is_shown_and_drawn(tmp_path: Path) -> None:
    answer = call("split", *SMALL, "--out", "out")
    assert answer.status == 0, answer.both
    assert "of 10 classes from 2 domains (digits, more)\n" in answer.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("classes.png", "domains.png", "sizes.png", "split.json")
    ]
    assert f"wrote {Path('out') / 'domains.png'}" in answer.out
    picture = imread(tmp_path / "out" / "domains.png")
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10, "something is drawn"
    table = [[cell.strip() for cell in row.split("│")[1:-1]] for row in answer.out.splitlines() if row[:1] == "│"]
    assert [(row[0], row[1]) for row in table] == [
        ("server", "digits 21, more 19"),
        *((str(client), "digits" if client < 3 else "more") for client in range(5)),
    ]


def test_a_scope_by_domain_can_be_compared() -> None:
    for seed in (0, 1):
        done(*SMALL, "baseline=fedavg", "rounds=1", f"seed={seed}")
    answer = call("compare", "--scope", "global/domain=more")
    assert answer.status == 0, answer.both
    assert "scope global/domain=more" in answer.out
    assert call("compare", "--scope", "global/domain=mroe").status == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("dataset=pacs dataset.size=8 server_data.domains=[photo] clients.number=9", "from 4 domains"),
        ("dataset=digits_five dataset.domains=[street,mnist_m] server_data.domains=[mnist_m]", "from 2 domains"),
    ],
)
def test_real_domains_on_the_server(real: Path, line: str, told: str) -> None:
    if not all((real / name).is_dir() for name in ("pacs", "mnist_m", "chars74k")):
        pytest.skip("pacs, mnist_m or chars74k is not in HYBRIDFL_DATA")
    answer = call("split", *line.split(), "server_data=domains", "partitioning=domains", "--all")
    assert answer.status == 0, answer.both
    assert told in answer.out
    server = "photo" if "pacs" in line else "mnist_m"
    owners = [row.split("│")[1:3] for row in answer.out.splitlines() if row[:1] == "│"]
    assert [owner.strip() for owner, domain in owners if domain.strip() == server] == ["server"]
