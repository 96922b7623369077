"""Ranks that fail, are stopped, are lost or are asleep."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from cli_helpers import TINY, checkpoint_rounds, done, status_of, tables
from ranks_helpers import done_in_ranks, launch, odd

from hybridfl.cli import main

LONG = (*TINY, "rounds=400", "baseline=fedavg", "checkpoint_seconds=0", "ui=none")
"""A run that is not done before something happens to it."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["task", "method", "jobs"])
def test_a_rank_that_fails_ends_all_of_them_with_its_reason(tmp_path: Path, how: str) -> None:
    line = odd(how)
    launched = launch(tmp_path, "train", *line, "executor=ranks")
    assert launched.join(30) == [1, 1], [launched.said(0), launched.said(1)]
    assert launched.said(1) == ""
    (told,) = [text for text in launched.said(0).splitlines() if text.startswith("hybridfl: ")]
    (run,) = Path("outputs/runs").iterdir()
    log = (run / "log.txt").read_text()
    if how == "task":
        client = max(_clients_of_round(line, 2))
        where = f"of 2 ({socket.gethostname()}), client {client} in round 3"
        assert told.endswith(f"{where}: ArithmeticError: out of luck")
        assert f"{where}: Traceback" in log
    elif how == "method":
        assert "ValueError: no idea" in told
        assert 'raise ValueError("no idea")' in log
    else:
        assert "the method decides by something that is not the same everywhere" in told
    assert "Traceback" not in launched.said(0)
    assert (status_of(run)["status"], status_of(run)["round"]) == ("failed", 2)
    assert checkpoint_rounds(run) == [2]
    if how != "task":
        return
    assert done(*line, "executor=sequential") == run.resolve()
    assert tables(run) == tables(done(*line, "executor=sequential", "output_dir=once"))


def _clients_of_round(line: list[str], index: int) -> list[int]:
    """Who takes part, which is the same for every method."""
    overrides = [text for text in line[2:] if not text.startswith("baseline")]
    plan = helpers.plan(*(text for text in overrides if text.split("=")[0] != "ui"), "baseline=fedavg")
    return [arrival.client for arrival in plan.engine().schedule.born(index)]


def test_ranks_that_are_stopped_continue_in_other_numbers(tmp_path: Path) -> None:
    line = [*LONG, "rounds=40"]
    for rank in (1, 0):
        launched = launch(tmp_path, "train", *line, "executor=ranks")
        launched.until(
            "outputs/runs/*/checkpoints/round-*.pt" if rank else "outputs/runs/*/checkpoints/round-00001*.pt"
        )
        launched.signal(rank, signal.SIGTERM)
        assert launched.join(30) == [130, 130], [launched.said(0), launched.said(1)]
        told = "hybridfl: interrupted; the same command continues where it stopped."
        assert launched.said(0).splitlines()[-1] == told
        assert launched.said(1) == ""
        (run,) = Path("outputs/runs").iterdir()
        state = status_of(run)
        assert state["status"] == "interrupted"
        assert 0 < state["round"] < 40
        assert checkpoint_rounds(run)[-1] == state["round"]
    assert done_in_ranks(tmp_path, *line, ranks=3) == run.resolve()
    assert tables(run) == tables(done(*line, "executor=sequential", "output_dir=once"))
    assert (run / "log.txt").read_text().count("continues after round") == 2


@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)])
def test_a_rank_that_is_lost(tmp_path: Path, rank: int, number: signal.Signals) -> None:
    launched = launch(tmp_path, "train", *LONG, "executor=ranks", "executor.timeout_seconds=1")
    launched.until("outputs/runs/*/checkpoints/round-000003-*.pt")
    launched.signal(rank, number)
    other = 1 - rank
    launched.ranks[other].join(20)
    assert launched.ranks[other].exitcode == 1, launched.said(other)
    if number == signal.SIGSTOP:
        launched.signal(rank, signal.SIGKILL)
    launched.join(5)
    # Torch's own warnings of broken connections are kept from a process that has not imported it before.
    (told,) = [text for text in launched.said(other).splitlines() if text.startswith("hybridfl: ")]
    if rank == 0:
        assert told.startswith("hybridfl: the process where the 2 ranks meet is gone")
    else:
        assert f"rank 1 of 2 ({socket.gethostname()})" in told
        (run,) = Path("outputs/runs").iterdir()
        assert status_of(run)["status"] == "failed"
        assert checkpoint_rounds(run)[-1] == status_of(run)["round"]


def test_a_rank_that_is_asleep_is_alive(tmp_path: Path) -> None:
    launched = launch(tmp_path, "train", *odd("sleep"), "executor=ranks", "executor.timeout_seconds=0.5")
    launched.until("asleep")
    time.sleep(2)
    assert all(process.is_alive() for process in launched.ranks)
    launched.signal(0, signal.SIGINT)
    launched.ranks[0].join(0.5)
    launched.signal(1, signal.SIGINT)
    assert launched.join(20) == [130, 130]


def children(pid: int) -> list[int]:
    """Of a process, by their numbers."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1] if folder.name.isdigit() else ""
        except OSError:
            continue
        found += [int(folder.name)] if parent == str(pid) else []
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_torchrun_and_a_rank_that_is_killed(tmp_path: Path) -> None:
    line = [*LONG, "rounds=40"]
    root = str(Path(main.__code__.co_filename).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    agent = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "hybridfl", "train", *line, "executor=ranks"),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("outputs/runs/*/checkpoints/round-*.pt")):
        assert agent.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    ranks = children(agent.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    told, _ = agent.communicate(timeout=60)
    assert agent.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert told.count("hybridfl: interrupted; the same command continues where it stopped.") == 1, told
    (run,) = Path("outputs/runs").iterdir()
    assert status_of(run)["status"] == "interrupted"
    assert checkpoint_rounds(run)[-1] == status_of(run)["round"] < 40
    assert done(*line, "executor=sequential") == run.resolve()
    assert tables(run) == tables(done(*line, "executor=sequential", "output_dir=once"))
