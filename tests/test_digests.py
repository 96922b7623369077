"""A run's digest without its plan is the plan's; finished sweeps make no plans."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import TINY, call, done, rows

from hybridfl import sweep_entry
from hybridfl.config import Composer, choices
from hybridfl.errors import ConfigError, DataError
from hybridfl.plan import STARTS, DataCache, digest_before_draw, make_plan

SMALL = ("dataset=synthetic", "dataset.train=300", "dataset.test=60", "clients.number=3", "clients.per_round=2")
LINES = [
    "",
    "classes=0-3 evaluation.limit=20",
    "evaluation.limit=20 seed=3 baseline=fedavg",
    "classes=0-3 evaluation.limit=10",
    "classes=[0,1,2,4] evaluation.limit=10",
    "server_data=none baseline=fedavg",
    "server_data=style",
    "tasks.number=2 baseline=fedavg",
    "partitioning=file partitioning.path=split.json server_data=none baseline=fedavg partitioning.complete=false",
    "start=weights.pt model.hidden=[4]",
    "dataset.seed=4 seed=3 rounds=3.0 clients.per_round=1",
    "server_data=dataset dataset@server_data.dataset=synthetic server_data.dataset.seed=5",
]
SHIPPED = [name for name, file in choices("experiment").items() if "\nsweeps:" in file.read_text()]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_it_is_the_plans() -> None:
    Path("split.json").write_text(json.dumps([[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]))
    plan_of_weights = make_plan(_composed(*SMALL, "model.hidden=[4]"))
    torch.save(dict(plan_of_weights.federation.start.params), "weights.pt")
    cache, found = DataCache(), []
    for line in LINES:
        composed = _composed(*SMALL, *line.split())
        digest = digest_before_draw(composed, cache)
        assert digest in (make_plan(composed).digest, None), line
        found.append(digest)
    assert found.index(None) == len(LINES) - 1  # only drawing tells what the server reads
    assert len(set(found)) == len(LINES)


def test_it_follows_the_contents_of_files() -> None:
    line = (*SMALL, "server_data=none", "baseline=fedavg", "partitioning=file", "partitioning.path=a.json")
    found = []
    for extra in (12, 13):
        Path("a.json").write_text(json.dumps([[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, extra]]))
        composed = _composed(*line, "partitioning.complete=false")
        found.append(digest_before_draw(composed, DataCache()))
        assert found[-1] == make_plan(composed).digest
    assert found[0] != found[1]
    Path("a.json").unlink()
    assert digest_before_draw(composed, DataCache()) is None
    with pytest.raises((ConfigError, DataError)):
        make_plan(composed)


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_the_plans_in_shipped_presets(name: str) -> None:
    cache = DataCache()
    with Composer() as composer:
        for job, *_ in composer.cells([f"experiment={name}", "scale=smoke"]).values():
            composed = composer.compose(job)
            if composed.config["start"] not in STARTS:  # a file that has not been made
                continue
            assert digest_before_draw(composed, cache) in (make_plan(composed, cache).digest, None)


def test_a_finished_sweep_makes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("-m", *TINY, "baseline=fedavg,fedprox", "seed=0,1", "rounds=1")
    folder = done(*line)
    table = (folder / "runs.csv").read_text()
    planned: list[str] = []

    def counted(composed: object, cache: object) -> object:
        planned.append(composed.line)  # type: ignore[attr-defined]
        return make_plan(composed, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep_entry, "make_plan", counted)
    answer = call("train", *line)
    assert (answer.folder, planned) == (folder, [])
    assert "4 of the sweep's 4 jobs are finished already." in answer.out
    assert (folder / "runs.csv").read_text() == table
    more = done(*line[:-2], "seed=0,2", "rounds=1")
    assert ["seed=2" in text for text in planned] == [True, True]
    assert [job["status"] for job in rows(more / "runs.csv")] == ["done"] * 4


def test_rerun_makes_them_all_again() -> None:
    line = ("-m", *TINY, "baseline=fedavg", "seed=0,1", "rounds=1")
    done(*line)
    folder = done(*line, "rerun=true")
    assert [job["run"].endswith("-2") for job in rows(folder / "runs.csv")] == [True, True]


def _composed(*overrides: str):  # type: ignore[no-untyped-def]
    with Composer() as composer:
        return composer.compose(overrides)
