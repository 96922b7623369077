"""What a stream's accuracies come to: averages and forgetting by hand, and what ``show`` and ``compare`` make of a run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import call, done, rows
from hypothesis import given
from hypothesis import strategies as st

from hybridfl.compare import Options, render
from hybridfl.errors import ConfigError
from hybridfl.forgetting import forgetting, forgetting_learned
from hybridfl.runs import read_run
from hybridfl.show import describe

MATRIX = [[0.75], [0.875, 0.5], [0.25, 0.625, 0.5], [0.5, 0.375, 0.25, 0.125]]


def test_forgetting_by_hand() -> None:
    # From the best: 0.875 - 0.5, 0.625 - 0.375, 0.5 - 0.25; from the diagonal: 0.75 - 0.5, 0.5 - 0.375, 0.5 - 0.25.
    assert forgetting(MATRIX) == (0.375 + 0.25 + 0.25) / 3
    assert forgetting_learned(MATRIX) == (0.25 + 0.125 + 0.25) / 3
    assert forgetting(MATRIX[:2]) == forgetting_learned(MATRIX[:2]) == -0.125
    assert all(math.isnan(found(MATRIX[:1])) for found in (forgetting, forgetting_learned))


def test_what_is_not_known_is_not_taken_for_nothing() -> None:
    gap = [[0.5], [math.nan, 0.5], [0.25, 0.5, 0.5]]
    assert math.isnan(forgetting(gap))
    assert forgetting_learned(gap) == 0.125


@given(st.integers(2, 6), st.integers(0, 99))
def test_the_best_is_never_worse_than_the_first(number: int, seed: int) -> None:
    accuracies = np.random.default_rng(seed).random((number, number))
    matrix = [row[: task + 1].tolist() for task, row in enumerate(accuracies)]
    # Chaudhry et al. on the whole square, with what was not seen yet out of the way.
    square = np.where(np.tri(number, dtype=bool), accuracies, -np.inf)
    assert forgetting(matrix) == pytest.approx(np.mean(square[:-1].max(0)[:-1] - square[-1, :-1]))
    assert forgetting(matrix) >= forgetting_learned(matrix) - 1e-12


# -- runs ------------------------------------------------------------------------------------------------------------

HEADER = "round,scope,accuracy,loss,worst10,spread,examples,bytes_up,bytes_down,bytes_peer"


def make(
    output_dir: Path,
    name: str,
    curves: Mapping[str, Mapping[int, float]],
    rounds: int = 6,
    tasks: int = 3,
    status: str = "done",
    method: str = "fedavg",
) -> Path:
    """A fabricated run: scope → round → accuracy."""
    folder = output_dir / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"seed: 0\nrounds: {rounds}\ntasks: {{number: {tasks}}}\nmethod: {{name: {method}, _target_: x.Y}}\ndigest: d\n"
    )
    (folder / "status.json").write_text(json.dumps({"status": status, "split": "s", "round": rounds, "rounds": rounds}))
    lines = [f"{r},{scope},{value},1,,,9,{r}e6,," for scope, curve in curves.items() for r, value in curve.items()]
    (folder / "metrics.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    return folder


# Three tasks of two rounds each; every round is evaluated.
CURVES: dict[str, dict[int, float]] = {
    "global": {1: 0.5, 2: 0.75, 3: 0.5, 4: 0.625, 5: 0.25, 6: 0.375},
    "global/tasks": {1: 0.5, 2: 0.75, 3: 0.5, 4: 0.5, 5: 0.25, 6: 0.25},
    "global/task=0": {1: 0.5, 2: 0.75, 3: 0.875, 4: 0.25, 5: 0.5, 6: 0.125},
    "global/task=1": {3: 0.125, 4: 0.75, 5: 0.5, 6: 0.25},
    "global/task=2": {5: 0.5, 6: 0.375},
}


def until(last: int, curves: Mapping[str, Mapping[int, float]] = CURVES) -> dict[str, dict[int, float]]:
    cut = {scope: {r: value for r, value in curve.items() if r <= last} for scope, curve in curves.items()}
    return {scope: curve for scope, curve in cut.items() if curve}


def test_the_matrix_has_a_row_for_every_task_that_is_over(tmp_path: Path) -> None:
    whole = [[0.75], [0.25, 0.75], [0.125, 0.25, 0.375]]
    assert read_run(make(tmp_path, "a", CURVES)).matrix("global") == whole
    for last, over in ((1, 0), (2, 1), (3, 1), (4, 2), (5, 2)):
        run = read_run(make(tmp_path, f"b{last}", until(last), status="running"))
        assert run.matrix("global") == whole[:over]
    assert read_run(make(tmp_path, "c", CURVES)).matrix("served") == []
    assert read_run(make(tmp_path, "d", {"global": {6: 0.5}}, tasks=1)).matrix("global") == []
    gap = {scope: {r: v for r, v in curve.items() if r != 4} for scope, curve in CURVES.items()}
    found = read_run(make(tmp_path, "e", gap)).matrix("global")
    assert found[0] + found[2] == whole[0] + whole[2]
    assert all(map(math.isnan, found[1]))


def shown(folder: Path) -> list[str]:
    return describe(read_run(folder)).partition("\n\n")[2].splitlines()


def test_show_prints_the_matrix_and_what_it_comes_to(tmp_path: Path) -> None:
    stored = {
        scope: CURVES[scope] for scope in sorted(CURVES)
    }  # as evaluation writes them, the first task before the mean
    assert list(stored)[1] == "global/task=0"
    lines = shown(make(tmp_path, "a", stored))
    assert [line.split()[0] for line in lines[1:6]] == list(CURVES)
    assert lines[6:] == [
        "",
        "accuracy % of global after each task (rows) on each task (columns)",
        "after   task=0  task=1  task=2  all examples  all tasks",
        "task=0    75.0                          75.0       75.0",
        "task=1    25.0    75.0                  62.5       50.0",
        "task=2    12.5    25.0    37.5          37.5       25.0",
        "final average accuracy  37.5 over examples, 25.0 over tasks",
        "forgetting              56.2 from the best accuracy on a task, 56.2 from the one just after learning it",
    ]


def test_show_prints_the_part_that_is_there(tmp_path: Path) -> None:
    assert shown(make(tmp_path, "a", until(1), status="failed"))[-1] == "the first of 3 tasks is not over yet"
    assert shown(make(tmp_path, "b", until(3), status="failed"))[-3:] == [
        "after   task=0  all examples  all tasks",
        "task=0    75.0          75.0       75.0",
        "average accuracy after 1 of 3 tasks  75.0 over examples, 75.0 over tasks",
    ]
    assert shown(make(tmp_path, "c", until(5), status="failed"))[-2:] == [
        "average accuracy after 2 of 3 tasks  62.5 over examples, 50.0 over tasks",
        "forgetting                           50.0 from the best accuracy on a task, 50.0 from the one just after learning it",
    ]


def served(curves: Mapping[str, Mapping[int, float]] = CURVES) -> dict[str, Mapping[int, float]]:
    return {scope.replace("global", "served"): curve for scope, curve in curves.items()}


def test_show_takes_the_clients_models_where_there_is_no_global_one(tmp_path: Path) -> None:
    titles = {name: shown(make(tmp_path, name, c)) for name, c in (("a", served()), ("b", {**served(), **CURVES}))}
    assert [next(line for line in lines if "(rows)" in line).split()[3] for lines in titles.values()] == [
        "served",
        "global",
    ]


def table(path: Path, **options: Any) -> dict[str, dict[str, str]]:
    text = render([path], Options(**{"format": "csv", **options}), warn=lambda _: None)
    return {line["method"]: line for line in csv.DictReader(io.StringIO(text))}


def test_a_table_of_a_stream_shows_averages_and_forgetting(tmp_path: Path) -> None:
    make(tmp_path, "a", {**CURVES, **served()})
    make(tmp_path, "b", served(), method="local_only")
    header, *body = render([tmp_path], Options(format="markdown"), warn=lambda _: None).splitlines()
    names = [name.strip() for name in header.strip("|").split("|")]
    assert names == [
        *("method", "seeds", "accuracy global", "global/tasks", "forgetting global"),
        *("served", "served/tasks", "forgetting served", "− fedavg [95 %]", "MB"),
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body[1:3]]
    assert [row[1:8] for row in cells] == [
        ["1", "37.5", "25.0", "56.2", "37.5", "25.0", "56.2"],
        ["1", "–", "–", "–", "37.5", "25.0", "56.2"],
    ]
    assert "last evaluation" in body[4]
    assert "final average accuracies" in "".join(body)
    assert "best earlier accuracy" in "".join(body)
    named = render([tmp_path], Options(target=0.375), warn=lambda _: None)
    assert "rounds to 37.5 %" in named


def test_forgetting_is_a_metric(tmp_path: Path) -> None:
    more = CURVES | {"global/task=0": {1: 0.5, 2: 0.5, 3: 0.875, 4: 0.75, 5: 0.5, 6: 0.125}}
    make(tmp_path, "a", more)
    make(tmp_path, "b", CURVES, method="other")
    assert {m: float(line["mean"]) for m, line in table(tmp_path, metric="forgetting").items()} == {
        "fedavg": (0.625 + 0.5) / 2,
        "other": (0.625 + 0.5) / 2,
    }
    learned = table(tmp_path, metric="forgetting_learned")
    assert float(learned["fedavg"]["mean"]) == (0.375 + 0.5) / 2
    assert float(learned["other"]["difference"]) == 0.125
    markdown = render([tmp_path], Options(metric="forgetting_learned", format="markdown"), warn=lambda _: None)
    assert "**43.8**" in markdown  # less is better
    with pytest.raises(ConfigError, match=r"--at: got mean10: .* nearest valid value: last") as caught:
        table(tmp_path, metric="forgetting", at="mean10")
    assert caught.value.key == "--at"


def test_forgetting_is_no_metric_of_one_task(tmp_path: Path) -> None:
    make(tmp_path, "a", {"global": {1: 0.5, 2: 0.75}}, tasks=1, rounds=2)
    with pytest.raises(ConfigError, match="no run has the metric 'forgetting'"):
        table(tmp_path, metric="forgetting")
    assert float(table(tmp_path)["fedavg"]["mean"]) == 0.625
    assert "forgetting" not in render([tmp_path], Options())


def test_rounds_before_the_last_task_do_not_count(tmp_path: Path) -> None:
    make(tmp_path, "a", CURVES | {"validation": {1: 0.9, 2: 0.9, 3: 0.9, 4: 0.9, 5: 0.5, 6: 0.25}})
    means = {at: float(table(tmp_path, at=at)["fedavg"]["mean"]) for at in ("auto", "last", "mean10", "best")}
    assert means == {"auto": 0.375, "last": 0.375, "mean10": 0.3125, "best": 0.25}
    reached = table(tmp_path, target=0.3)["fedavg"]
    assert (reached["rounds_to_target"], reached["bytes_to_target"]) == ("6.0", "6000000.0")


# -- the real thing --------------------------------------------------------------------------------------------------

STREAM = (
    *("dataset=synthetic", "dataset.train=300", "dataset.test=90", "dataset.classes=6", "tasks.number=3"),
    *("rounds=7", "clients.number=4", "clients.per_round=2", "client_optimizer.epochs=1", "ui=none"),
)


def test_the_end_of_every_task_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sparse = done(*STREAM, "baseline=local_only", "evaluate_every=100", "evaluation.sample=1")
    often = done(*STREAM, "baseline=local_only")
    found = {run: [row | {"seconds": ""} for row in rows(run / "metrics.csv")] for run in (sparse, often)}
    assert sorted({int(row["round"]) for row in found[sparse]}) == [3, 5, 7]
    # And of all clients, of which other rounds would take a sample.
    assert found[sparse] == [row for row in found[often] if row["round"] in ("3", "5", "7")]
    matrix = read_run(sparse).matrix("served")
    assert [len(row) for row in matrix] == [1, 2, 3]
    assert np.isfinite(np.concatenate(matrix)).all()
    last = {row["scope"]: float(row["accuracy"]) for row in found[sparse] if row["round"] == "7"}
    assert last["served/tasks"] == pytest.approx(np.mean(matrix[-1]))
    answer = call("show", str(sparse))
    assert f"{100 * forgetting(matrix):.1f} from the best accuracy" in answer.out
    assert f"{100 * last['served']:.1f} over examples" in answer.out
