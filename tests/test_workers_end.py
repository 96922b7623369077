"""Worker processes that end, and that they end with the program."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import executor_rules
import helpers
import pytest
import workers_helpers
from cli_helpers import TINY, call, checkpoint_rounds, done, program, rows, said, start, status_of, tables
from workers_helpers import DEADLY, SHARED, agree, alive, facts, harm, pids, run, tasks, until

from hybridfl.errors import HybridflError
from hybridfl.executors import pool as pools
from hybridfl.executors import workers
from hybridfl.executors.sequential import Sequential
from hybridfl.executors.workers import Workers
from hybridfl.local import cross_entropy

executor = workers_helpers.executor


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


# -- workers that end --------------------------------------------------------------------------------------------------


ENDS = {
    "SIGKILL": "was killed by SIGKILL",
    "SIGSEGV": "was killed by SIGSEGV",
    "exit": "ended with status 3",
    "SIGSTOP": "used no processor time for 2 s and was ended",
    "sleep": "used no processor time for 2 s and was ended",
    "template": "",
}


@pytest.mark.parametrize("kind", ENDS)
def test_work_of_a_process_that_ended_is_done_again(
    executor: Workers, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run(executor, tasks())
    found = run(executor, harm(kind, once=True))
    assert Path("flag").exists()
    assert helpers.identical(facts(found), facts(run(Sequential(), harm(""))))
    told = capfd.readouterr().err
    if ENDS[kind]:
        line = f"hybridfl: the worker process of client 1 in round 4 {ENDS[kind]}; its work is done again.\n"
        assert line in told
    assert "Traceback" not in told
    assert agree(executor, tasks)


def test_a_task_that_ends_two_processes_is_given_up(executor: Workers, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HybridflError) as caught:
        run(executor, harm("SIGKILL"))
    told = "the worker process of client 1 in round 4 was killed by SIGKILL"
    either = "and the one before it did not get through either"
    assert str(caught.value) == f"{told}, {either}; is there too little memory?"
    assert capfd.readouterr().err.count("done again") == 1
    with pytest.raises(HybridflError, match=f"client 1 in round 4 ended with status 3, {either}\\.$"):
        run(executor, harm("exit"))
    assert agree(executor, tasks)


def test_a_worker_that_is_busy_for_long_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    with Workers(1, hang_seconds=0.5) as executor:
        run(executor, tasks())
        (worker,) = executor._pool[0].workers
        given = harm("loop", only=0)[:1]
        looked: list[int] = []

        def look(self: pools.Worker, look: Any = pools.Worker.look) -> None:
            look(self)
            looked.append(self.quiet)
            if len(looked) > 3 * pools.PATIENCE and not Path("flag").exists():
                os.kill(self.pid, signal.SIGKILL)
                Path("flag").touch()

        monkeypatch.setattr(pools.Worker, "look", look)
        run(executor, given)
        assert max(looked) < pools.PATIENCE
        assert not alive(worker.pid)


def test_a_worker_that_ended_between_two_rounds_is_replaced(executor: Workers) -> None:
    run(executor, tasks())
    for pid in pids(executor):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(alive, pids(executor))))
    assert agree(executor, tasks)


def test_the_process_that_workers_come_from_is_started_again(executor: Workers) -> None:
    for close in (True, False):
        run(executor, tasks())
        before = pids(executor)
        if close:
            executor.close()
        pools.template().process.kill()
        pools.template().process.wait()
        assert agree(executor, tasks)
        assert not pids(executor) & before
        assert not any(map(alive, before))


def test_ctrl_c_while_a_worker_is_started(executor: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    executor.close()
    before = pools.template()

    def interrupted(source: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pools, "received", interrupted)
        run(executor, tasks())
    assert agree(executor, tasks)
    assert pools.template() is not before


def test_ctrl_c_in_the_middle_of_a_round(executor: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    run(executor, tasks())
    before = pids(executor)

    def interrupted(self: Any, worker: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pools._Round, "_take", interrupted)
        run(executor, tasks())
    assert not any(map(alive, before))
    assert agree(executor, tasks)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_that_lost_its_workers_continues_from_its_last_round() -> None:
    once = tables(done(*DEADLY, "executor=sequential", "output_dir=once"))
    Path("deadly").write_text("SIGKILL")
    answer = call("train", *DEADLY, *SHARED)
    assert answer.status == 1
    assert re.search(
        r"hybridfl: the worker process of client \d in round 3 was killed by SIGKILL, and the one", answer.err
    )
    assert "Traceback" not in answer.err
    (folder,) = (path.resolve() for path in Path("outputs/runs").iterdir())
    assert (status_of(folder)["status"], status_of(folder)["round"]) == ("failed", 2)
    assert checkpoint_rounds(folder) == [2]
    Path("deadly").unlink()
    assert done(*DEADLY, *SHARED) == folder
    assert "continues after round 2" in (folder / "log.txt").read_text()
    assert tables(folder) == once


def test_a_sweep_has_the_tables_of_sequential() -> None:
    line = ("-m", *TINY, "ui=none", "device=cpu", "baseline=fedavg,fedprox", "seed=0,1")
    folders = [
        done(*line, "output_dir=a", "executor=sequential"),
        done(*line, "output_dir=b", "executor=workers", "executor.number=2"),
    ]
    runs = [sorted((folder.parent.parent / "runs").iterdir()) for folder in folders]
    assert [path.name for path in runs[0]] == [path.name for path in runs[1]]  # the executor is no part of a run
    assert len(runs[0]) == 4
    assert all(tables(a) == tables(b) for a, b in zip(*runs, strict=True))


# -- processes that stay behind ----------------------------------------------------------------------------------------


def descendants(pid: int) -> set[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def test_nothing_stays_behind_however_the_program_is_stopped(tmp_path: Path) -> None:
    memory = set(os.listdir("/dev/shm"))
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    Path("deadly").write_text("sleep")  # in round 2, for longer than this takes
    line = (*DEADLY, "checkpoint_seconds=0")
    processes = {number: start(tmp_path, "train", *line, *SHARED, f"output_dir={number.name}") for number in signals}
    for number, process in processes.items():
        folder = tmp_path / number.name / "runs"
        until(lambda folder=folder: list(folder.glob("*/checkpoints/round-000002-*.pt")))
        children = descendants(process.pid or 0)
        assert len(children) == 3, "the process that is forked, and two workers"
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, number if number != signal.SIGKILL else signal.SIGCONT)  # as the keyboard would
        os.kill(max(children), signal.SIGSTOP)  # one that cannot listen
        os.kill(process.pid or 0, number)
        process.join()
        until(lambda children=children: not any(map(alive, children)), 20)
        (run,) = folder.iterdir()
        assert checkpoint_rounds(run)[-1] == 2
        assert process.exitcode == (-number if number == signal.SIGKILL else 130), said(tmp_path, process)
        assert status_of(run)["status"] == ("running" if number == signal.SIGKILL else "interrupted")
        assert "Traceback" not in said(tmp_path, process)
    assert set(os.listdir("/dev/shm")) <= memory
    Path("deadly").unlink()
    once = tables(done(*line, "executor=sequential", "output_dir=once"))
    for number in signals:  # goes on with another number of workers
        assert tables(done(*line, "executor=workers", "executor.number=1", f"output_dir={number.name}")) == once


SCRIPT = """
import sys
with open("ran.txt", "a") as file:
    file.write("once\\n")
from hybridfl.cli import main
status = main(sys.argv[1:])
sys.stdout.flush()
raise SystemExit(status)
"""


def test_a_program_of_the_users_own_runs_once_and_nothing_stays_behind() -> None:
    """Without ``if __name__ == "__main__"``; one script with its own module, as a console script, and ``-m hybridfl``."""
    Path("script.py").write_text(SCRIPT)
    Path("mine.py").write_text(Path(executor_rules.__file__).read_text())
    alone = (*TINY, "ui=none", "device=cpu", "baseline=fedavg", "baseline._target_=mine.Deadly")
    line = ("train", *alone, *SHARED)
    source = [str(Path(workers.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, source))}
    script = subprocess.Popen(
        [sys.executable, "-W", "error", "script.py", *line, "output_dir=a"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    module = program(Path.cwd(), *line, "output_dir=b")
    for process in (script, module):
        with process:
            out, err = process.communicate(timeout=120)  # ends when nobody can write there any more
            assert (process.returncode, err) == (0, ""), out + err
    assert Path("ran.txt").read_text() == "once\n"
    a, b = (next(Path(name, "runs").iterdir()) for name in "ab")
    assert tables(a) == tables(b) == tables(done(*alone, "executor=sequential", "output_dir=c"))
    assert rows(a / "metrics.csv")


def test_cross_entropy_is_found_in_a_worker(executor: Workers) -> None:
    assert agree(executor, lambda: tasks(loss=cross_entropy))
