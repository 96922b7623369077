"""A run that was stopped, in whatever way, continues and ends with the same tables as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from cli_helpers import TINY as ANY
from cli_helpers import Answer, call, checkpoint_rounds, done, program, rows, said, start, status_of, tables

from hybridfl import checkpoints, experiment
from hybridfl.config import Composer, choices
from hybridfl.executors import sequential
from hybridfl.local import Outcome, Task, Workbench, run_task
from hybridfl.plan import settings_of
from hybridfl.runs import read_run
from hybridfl.store import StoreError

TINY = (*ANY, "executor=sequential")
"""One task after the other, so that a run can be interrupted between two."""
LONG = (*TINY, "rounds=25", "clients.delay=4", "merging.coef.init=warm", "checkpoint_seconds=0", "ui=none")
"""Feddle with late results, a state that grows, and a checkpoint after every round: about a second."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tables of LONG, run in one go."""
    return tables(done(*LONG, f"output_dir={tmp_path_factory.mktemp('whole')}"))


def interrupt(monkeypatch: pytest.MonkeyPatch, round: int, call_in_round: int = 1) -> None:
    """Ctrl-C in the middle of this round (the first is 0), in the n-th task that is given to the executor."""
    seen = 0

    def stopped(bench: Workbench, task: Task) -> Outcome:
        nonlocal seen
        seen += task.round == round
        if task.round == round and seen == call_in_round:
            raise KeyboardInterrupt
        return run_task(bench, task)

    monkeypatch.setattr(sequential, "run_task", stopped)


def interrupted(monkeypatch: pytest.MonkeyPatch, round: int, *overrides: str) -> tuple[Answer, Path]:
    """A run that was interrupted in this round; its folder."""
    with monkeypatch.context() as patch:
        interrupt(patch, round)
        answer = call("train", *overrides)
    assert answer.status == 130, answer.both
    (run,) = Path("outputs/runs").iterdir()
    return answer, run.resolve()


def until(condition: Callable[[], bool], process: ForkServerProcess | None = None, seconds: float = 60) -> None:
    """Waits, but not for a process that has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.is_alive(), "ended too early"
        time.sleep(0.002)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


# -- Ctrl-C in this process ------------------------------------------------------------------------------------------

# A baseline that has the name of a merging method is that one.
METHODS = [("merging", name) for name in choices("merging")]
METHODS += [("baseline", name) for name in choices("baseline") if name not in {"none", *choices("merging")}]


@pytest.mark.parametrize(("group", "name"), METHODS, ids=[name for _, name in METHODS])
def test_every_method_continues_where_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, group: str, name: str
) -> None:
    # Momentum, because an optimiser's state is easily forgotten.
    elsewhere = {"server_only": "baseline.momentum=0.9", "qg_dsgdm": "baseline.beta=0.8"}
    # These reckon with steps of plain SGD.
    elsewhere |= dict.fromkeys(("fedclg_s", "mixed_fl_two_way"), "client_optimizer.lr_decay=0.9")
    momentum = elsewhere.get(name, "client_optimizer.momentum=0.9")
    tiny = [text for text in TINY if name == "feddle" or not text.startswith("merging.")]
    line = (*tiny, f"{group}={name}", momentum, "clients.validation=0.2", "evaluation.sample=2", "rounds=3")
    with Composer() as composer:
        _, method = settings_of(composer.compose(line))
    line += (f"clients.delay={1.5 if method.asynchronous else 0}",)
    once = done(*line, "output_dir=once")
    scores = rows(once / "metrics.csv")
    assert scores[-1]["round"] == "3"
    assert all(0 <= float(row["accuracy"]) <= 1 for row in scores)
    assert read_run(once).config["method"]["name"] == name
    _, run = interrupted(monkeypatch, 2, *line)
    assert (status_of(run)["status"], status_of(run)["round"]) == ("interrupted", 2)
    assert checkpoint_rounds(run) == [2]
    assert done(*line) == run
    assert tables(run) == tables(once)
    assert "continues after round 2" in (run / "log.txt").read_text()
    assert "differently" not in (run / "log.txt").read_text()


def test_clients_of_every_kind_continue_where_they_were_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        *(*TINY, "rounds=9", "baseline=fedbuff", "clients.number=10", "clients.per_round={0:2,4:1}"),
        *("clients.concurrency=4", "clients.timing.speeds=1", "clients.failure=0.3", "clients.dropout=0.2"),
        *("clients.cycle.groups=2", "clients.cycle.rounds=2", "clients.held_out=1"),
        *("clients.random_updates=0.3", "clients.noisy_inputs=0.2"),
    )
    once = done(*line, "output_dir=once")
    for round in (3, 6):
        _, run = interrupted(monkeypatch, round, *line)
    assert done(*line) == run
    assert tables(run) == tables(once)
    log = (run / "log.txt").read_text()
    assert log.count("continues after round") == 2
    assert "results lost on the way" in log
    assert "differently" not in log
    split = json.loads((run / "split.json").read_text())
    assert Counter(split["roles"].values()) == {"held_out": 1, "noisy_inputs": 2, "random_updates": 3}
    assert split["noisy_clients"] == []
    ends = {int(row["round"]): float(row["sim_seconds"]) for row in rows(run / "metrics.csv")}
    assert list(ends.values()) == sorted(ends.values())
    assert len(set(ends.values())) == 9


def test_the_start_on_the_server_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    line = (*TINY, "baseline=fedavg", "start=server", "start_steps=20")
    once = done(*line, "output_dir=once")
    _, run = interrupted(monkeypatch, 1, *line)
    done(*line)
    assert tables(run) == tables(once)


def test_interrupted_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    once = done(*TINY, "output_dir=once")
    for round in range(4):
        answer, run = interrupted(monkeypatch, round, *TINY)
        assert f"interrupted after round {round} of 4; the same command continues it" in answer.out
        assert "hybridfl: interrupted" in answer.err
    done(*TINY)
    assert tables(run) == tables(once)


def test_interrupted_before_there_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    once = done(*TINY, "output_dir=once")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "Table", interrupted)
        answer = call("train", *TINY)
    assert answer.status == 130, answer.both
    assert "interrupted after round 0 of 4" in answer.out
    run = done(*TINY)
    assert tables(run) == tables(once)


def test_no_room_for_the_checkpoint_of_an_interrupted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise StoreError("Cannot write checkpoint: No space left on device.")

    once = done(*TINY, "output_dir=once")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", full)
        answer, run = interrupted(patch, 2, *TINY)
    assert "No space left on device" in answer.both
    assert "Traceback" not in answer.both
    assert done(*TINY) == run
    assert tables(run) == tables(once)


def test_rows_after_the_checkpoint_are_compared_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    once = done(*TINY, "output_dir=once")
    _, run = interrupted(monkeypatch, 3, *TINY)
    (checkpoint,) = (run / "checkpoints").iterdir()
    checkpoint.unlink()  # as if it had been killed before it wrote one
    metrics = (run / "metrics.csv").read_bytes()
    assert rows(run / "metrics.csv")[-1]["round"] == "3"
    answer = call("train", *TINY)
    assert answer.status == 0
    assert (run / "metrics.csv").read_bytes().startswith(metrics)
    assert tables(run) == tables(once)
    assert "differently" not in answer.both


def test_a_row_that_comes_out_differently_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = interrupted(monkeypatch, 3, *TINY)
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.unlink()
    first = rows(run / "metrics.csv")[0]["accuracy"]
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.replace(f"1,global,{first},", "1,global,0.987,", 1))
    answer = call("train", *TINY)
    assert answer.status == 0
    assert "1 values came out differently" in answer.out
    assert f"metrics.csv, round 1, row 1, column accuracy: was '0.987', now '{first}'" in answer.out


# -- damaged checkpoints ---------------------------------------------------------------------------------------------


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    _, run = interrupted(monkeypatch, 12, *LONG)
    before, newest = sorted((run / "checkpoints").iterdir())
    damage(newest)
    answer = call("train", *LONG)
    assert answer.status == 0
    assert f"{newest.name} is skipped: it is damaged" in answer.err
    assert "continues after round 11" in (run / "log.txt").read_text()
    assert before.name.startswith("round-000011-")
    assert tables(run) == whole


def test_with_all_checkpoints_damaged_it_starts_again(monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]) -> None:
    _, run = interrupted(monkeypatch, 8, *LONG)
    for file in (run / "checkpoints").iterdir():
        damage(file)
    answer = call("train", *LONG)
    assert answer.status == 0
    assert answer.err.count("is skipped") == 2
    assert "differently" not in answer.both
    assert (run / "log.txt").read_text().count(" starts: ") == 2
    assert tables(run) == whole


# -- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_any_moment_continues(tmp_path: Path, whole: dict[str, bytes], seed: int) -> None:
    moments = random.Random(seed)
    metrics = None
    # In the set-up, and then while rounds are computed and written.
    for share in (None, 0.3, 0.6):
        process = start(tmp_path, "train", *LONG)
        if share is not None:
            wanted = 1 + 3 * 25 * share
            until(lambda: any(Path("outputs/runs").glob("*/metrics.csv")), process)
            (metrics,) = Path("outputs/runs").glob("*/metrics.csv")
            until(lambda: lines(metrics) > wanted, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, said(tmp_path, process)
    assert metrics is not None
    run = metrics.parent.resolve()
    assert status_of(run)["status"] == "running"
    assert checkpoint_rounds(run)
    killed_at = int(rows(metrics)[-1]["round"])
    assert 15 <= killed_at < 25
    assert done(*LONG) == run
    assert tables(run) == whole
    assert (run / "log.txt").read_text().count("continues after round") >= 1
    assert "differently" not in (run / "log.txt").read_text()


# -- signals ---------------------------------------------------------------------------------------------------------


def test_sigterm_to_the_real_program_writes_a_checkpoint(tmp_path: Path) -> None:
    with program(tmp_path, "train", *TINY, "rounds=3000", "evaluate_every=10") as process:
        assert process.stdout is not None
        shown = [process.stdout.readline(), process.stdout.readline()]
        process.terminate()
        out, err = process.communicate(timeout=30)
    assert "round 1/3000" in shown[1]
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    assert err == "hybridfl: interrupted; the same command continues where it stopped.\n"
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    status = status_of(run)
    assert status["status"] == "interrupted"
    # Checkpoints are 20 s apart: this one was written by the signal.
    assert checkpoint_rounds(run) == [status["round"]]
    assert f"interrupted after round {status['round']} of 3000; the same command continues it" in out


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM], ids=lambda which: which.name)
def test_a_signal_at_a_random_moment(tmp_path: Path, whole: dict[str, bytes], which: signal.Signals) -> None:
    line = (*(word for word in LONG if not word.startswith("checkpoint_seconds")), "checkpoint_seconds=1000")
    for round in (3, 17):
        process = start(tmp_path, "train", *line)
        until(lambda: any(Path("outputs/runs").glob("*/metrics.csv")), process)
        (metrics,) = Path("outputs/runs").glob("*/metrics.csv")
        until(lambda: lines(metrics) > 3 * round + 1, process)  # noqa: B023 - a round counts once the next one writes
        assert process.pid is not None
        os.kill(process.pid, which)
        process.join()
        assert process.exitcode == 130, said(tmp_path, process)
        assert "interrupted" in said(tmp_path, process)
        assert "Traceback" not in said(tmp_path, process)
        run = metrics.parent.resolve()
        assert status_of(run)["status"] == "interrupted"
        assert status_of(run)["round"] == checkpoint_rounds(run)[-1] >= round
    assert done(*line) == run
    assert tables(run) == whole


# -- two at once -----------------------------------------------------------------------------------------------------


def test_two_processes_with_the_same_line_share_one_run(tmp_path: Path, whole: dict[str, bytes]) -> None:
    both = [start(tmp_path, "train", *LONG) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], [said(tmp_path, process) for process in both]
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    assert tables(run) == whole
    assert (run / "log.txt").read_text().count(" starts: ") == 1
    told = [said(tmp_path, process) for process in both]
    assert all(text.splitlines()[-1] == f"run: {run}" for text in told)
    assert sum("Another process works on" in text and "already done" in text for text in told) == 1


# -- no room ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing_written_before(tmp_path: Path, whole: dict[str, bytes]) -> None:
    done(*LONG, "rounds=2")
    (short,) = Path("outputs/runs").iterdir()
    (size,) = {file.stat().st_size for file in (short / "checkpoints").glob("round-000002-*")}
    # Feddle's atlas grows from round to round, and its checkpoints with it: a few fit, then none.
    process = start(tmp_path, "train", *LONG, "output_dir=full", file_size=2 * size)
    process.join()
    text = said(tmp_path, process)
    assert process.exitcode == 1, text
    assert "File too large. Everything written before is kept." in text
    assert "Traceback" not in text
    (run,) = (tmp_path / "full" / "runs").iterdir()
    assert status_of(run)["status"] == "failed"
    assert "File too large" in status_of(run)["error"]
    kept = tables(run)
    assert checkpoint_rounds(run)
    assert 2 <= int(rows(run / "metrics.csv")[-1]["round"]) < 20
    assert not list(run.rglob("*.tmp"))
    assert done(*LONG, "output_dir=full") == run
    assert tables(run) == whole
    assert all(tables(run)[name].startswith(content) for name, content in kept.items())
    assert "continues after round" in (run / "log.txt").read_text()
