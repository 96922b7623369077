"""`hybridfl sweeps` and `hybridfl clean`, and what a sweep says of the disk beforehand."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from cli_helpers import TINY, call, checkpoint_rounds, done, rows, tables
from filelock import FileLock

from hybridfl.config import Composer
from hybridfl.plan import make_plan
from hybridfl.run_files import attempts_in, run_folders, size_of, state_of
from hybridfl.sweep_disk import run_bytes
from hybridfl.sweep_table import Row, write_rows


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def stored(name: str, status: str, size: int = 0, output: Path = Path("outputs")) -> Path:
    """A run folder as far as these commands look at it."""
    folder = output / "runs" / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"status": status}))
    (folder / "checkpoints" / "round-000001-0123456789abcdef.pt").write_bytes(b"x" * size)
    return folder


def swept(name: str, *jobs: Row) -> Path:
    folder = Path("outputs/sweeps") / name
    folder.mkdir(parents=True)
    write_rows(folder, jobs)
    (folder / "overrides.txt").write_text("seed=0,1\nmodel.hidden=[4]\n")
    return folder


# -- sweeps ----------------------------------------------------------------------------------------------------------


def test_sweeps_are_listed_with_what_their_folders_say() -> None:
    for name, status in (("a1", "done"), ("a2", "failed"), ("a3", "running"), ("a4", "interrupted"), ("a5", "failed")):
        stored(name, status, 1_000_000)
    stored("a5-2", "done", 3_000_000)
    stored("a1-2", "failed")
    swept(
        "5555aaaa",
        *(Row(f"a{k}", "pending", "fedavg", f"seed={k} rounds=2") for k in (1, 2, 3, 4, 5, 6)),
        Row("", "skipped", "fedavg", "seed=7 rounds=2", "no"),
        Row("a1", "done", "fedavg", "seed=8 rounds=2"),
    )
    head, line = call("sweeps").out.splitlines()
    assert head.split() == ["sweep", "when", "jobs", "done", "failed", "missing", "skipped", "size", "line"]
    told = line.split()
    assert told[0] == "5555aaaa"
    assert told[3:10] == ["8", "3", "1", "3", "1", "8.0", "MB"]
    assert line.endswith("hybridfl train -m seed=0,1 'model.hidden=[4]'")
    assert call("sweeps", "outputs").out.splitlines() == [head, line]


@pytest.mark.parametrize("what", ["5555", "5555aaaa", "outputs/sweeps/5555aaaa"])
def test_the_jobs_of_a_sweep(what: str) -> None:
    stored("a1", "done", 2_500_000)
    jobs = [
        Row("a1", "done", "fedavg", "seed=0 rounds=2", "", ("base", "noisy")),
        Row("a2", "failed", "x", "rounds=2", "oh\nno"),
    ]
    swept("5555aaaa", *jobs)
    answer = call("sweeps", what)
    assert answer.status == 0
    lines = answer.out.splitlines()
    assert lines[:4] == [
        "sweep     5555aaaa",
        "line      hybridfl train -m seed=0,1 'model.hidden=[4]'",
        "jobs      2: 1 done, 1 failed",
        "all with  rounds=2",
    ]
    assert [line.split() for line in lines[5:]] == [
        ["run", "status", "method", "cell", "size", "overrides"],
        ["a1", "done", "fedavg", "base", "|", "noisy", "2.5", "MB", "seed=0"],
        ["a2", "failed", "x", "0.0", "MB", "(oh)"],
    ]


def test_what_is_not_there() -> None:
    assert call("sweeps", ".").out == "no sweep in '.'\n"
    swept("5555aaaa", Row("a", "done", "x", ""))
    swept("5555bbbb", Row("a", "done", "x", ""))
    assert "several sweeps in 'outputs/sweeps' begin so: 5555aaaa, 5555bbbb" in call("sweeps", "5555").err
    answer = call("sweeps", "5556aaaa")
    assert (answer.status, "Did you mean '5555aaaa'?" in answer.err) == (2, True)


def test_a_run_that_is_held_is_running() -> None:
    folder = stored("a1", "running")
    assert state_of([folder]) == "stopped"
    with FileLock(folder / ".lock"):
        assert state_of([folder]) == "running"


def test_a_thousand_runs_are_listed_in_seconds() -> None:
    for k in range(1000):
        stored(f"{k:012x}", "done", 10)
    for sweep in range(5):
        swept(f"s{sweep}", *(Row(f"{k:012x}", "done", "fedavg", f"seed={k}") for k in range(1000)))
    begun = time.monotonic()
    assert call("sweeps").out.count(" 1000 ") == 10
    assert time.monotonic() - begun < 5


def test_the_sweeps_of_real_runs() -> None:
    folder = done("-m", *TINY, "rounds=1", "baseline=fedavg,fedprox")
    shutil.rmtree(next((folder.parent.parent / "runs").iterdir()))
    told = call("sweeps").out.splitlines()[1].split()
    assert told[0] == folder.name
    assert told[3:8] == ["2", "1", "0", "1", "0"]


# -- clean -----------------------------------------------------------------------------------------------------------


def test_checkpoints_of_finished_runs_are_removed_and_nothing_else() -> None:
    line = ("-m", *TINY, "rounds=1", "baseline=fedavg,fedprox")
    sweep = done(*line)
    runs = [Path("outputs/runs") / job["run"] for job in rows(sweep / "runs.csv")]
    before = [tables(run) for run in runs]
    unfinished = stored("ffff", "interrupted", 100)
    size = sum(size_of(run / "checkpoints") for run in runs)
    assert size > 0
    shown = call("clean", "--checkpoints", "--dry-run")
    assert f"checkpoints of 2 finished runs would be removed: {size / 1e6:.1f} MB; 1 unfinished runs" in shown.out
    assert [checkpoint_rounds(run) for run in runs] == [[1], [1]]
    freed = call("clean", "--checkpoints")
    assert "checkpoints of 2 finished runs removed" in freed.out
    assert [(run / "checkpoints").exists() for run in runs] == [False, False]
    assert size_of(unfinished / "checkpoints") == 100
    assert [tables(run) for run in runs] == before
    assert done(*line) == sweep
    assert call("clean", "--checkpoints").out.startswith("checkpoints of 0 finished runs removed: 0.0 MB")


def test_clean_takes_runs_and_sweeps() -> None:
    one, two, three = (stored(name, "done", 10) for name in ("a1", "a2", "a3"))
    sweep = swept("5555", Row("a1", "done", "x", ""))
    assert run_folders([sweep, two]) == [one.resolve(), two]
    assert call("clean", "--checkpoints", str(sweep), str(two)).status == 0
    assert [(run / "checkpoints").exists() for run in (one, two, three)] == [False, False, True]


def test_clean_wants_to_know_what() -> None:
    stored("a1", "done", 10)
    assert "clean: say what is to be removed: --checkpoints." in call("clean").err
    answer = call("clean", "--checkpoints", "output")
    assert (answer.status, "output: is no run, sweep or output folder. Did you mean 'outputs'?" in answer.err) == (
        2,
        True,
    )
    assert attempts_in(Path("outputs/runs")) == {"a1": [Path("outputs/runs/a1")]}


# -- disk ------------------------------------------------------------------------------------------------------------


def test_what_the_runs_will_take_is_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("-m", *TINY, "baseline=fedavg,fedprox", "model.hidden=[2000]", "rounds=1")
    answer = call("train", *line)
    assert "2 runs to do, about " in answer.out
    assert "warning" not in answer.both
    told = float(answer.out.partition("2 runs to do, about ")[2].split()[0])
    assert told * 1e6 / 6 < size_of(Path("outputs/runs")) < told * 1e6 * 1.2
    assert "runs to do" not in call("train", *line).out
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 9, 1000))
    answer = call("train", *line, "seed=1", "ui=none")
    assert "warning: the disk of '" in answer.err
    assert "hybridfl clean --checkpoints frees that of finished runs" in answer.err
    assert "runs to do" not in answer.both


def test_a_state_with_a_model_for_each_client_takes_more() -> None:
    def size(*line: str) -> int:
        with Composer() as composer:
            return run_bytes(make_plan(composer.compose([*TINY, "model.hidden=[500]", *line])))

    assert size("baseline=scaffold") > size("baseline=fedavg") * 1.25
    assert size("baseline=fedavg", "rounds=4000") > size("baseline=fedavg") + 3000 * 4 * 100
