"""What is shown while a sweep works."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from cli_helpers import TINY, call, done, rows
from rich.console import Console

from hybridfl.config import Composer
from hybridfl.sweep_board import LinesBoard, LiveBoard, Tally, make_board
from hybridfl.sweep_jobs import Job, Outcome
from hybridfl.sweep_submitit import last_round

DONE, FAILED = Outcome("done", "a"), Outcome("failed", "b", "no")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def job(seed: int = 3) -> Job:
    with Composer() as composer:
        return Job(0, composer.compose([f"seed={seed}", "baseline=fedavg"]), f"d{seed}")


def test_the_time_left_is_that_of_the_jobs_before() -> None:
    clock = Clock()
    tally = Tally(total=7, workers=2, clock=clock)
    tally.begin(0)
    tally.begin(1)
    assert tally.seconds_left() is None
    assert str(tally) == "0 of 7 done, 2 running"
    clock.now += 10
    tally.end(0, DONE)
    tally.begin(0)
    clock.now += 4
    tally.end(1, FAILED)
    # one job of 10 s; of the one under way 6 s are left, and four wait
    assert tally.seconds_left() == pytest.approx((6 + 4 * 10) / 2)
    assert str(tally) == "1 of 7 done, 1 running, 1 failed, about 0:23 left"
    clock.now += 20
    assert tally.seconds_left() == pytest.approx(4 * 10 / 2)  # one that takes longer than thought owes nothing
    tally.end(0, DONE)
    tally.total = 3
    assert str(tally) == "2 of 3 done, 1 failed"


def live(total: int = 4) -> tuple[LiveBoard, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, highlight=False, markup=False, color_system=None)
    return LiveBoard(Tally(total, 2, Clock()), console), out


def shown(board: LiveBoard) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(board.picture())
    return [line.split() for line in console.export_text().splitlines()]


def test_the_board_has_a_line_for_each_run_under_way() -> None:
    board, _ = live()
    board.begin(1, job(1))
    board.begin(0, job(0))
    assert shown(board)[:2] == [["fedavg", "seed=0", "d0", "prepares"], ["fedavg", "seed=1", "d1", "prepares"]]
    progress = board.progress(1)
    progress.start("fedavg seed=1 d1", 60, 5)
    progress.round(6, 0.825, 10)
    progress.round(7, None, 20)
    assert shown(board)[1] == ["fedavg", "seed=1", "d1", "round", "7/60", "accuracy", "82.5", "%"]
    assert shown(board)[-1][0] == "sweep"
    assert shown(board)[-1][-6:] == ["0", "of", "4", "done,", "2", "running"]
    board.end(1, job(1), DONE)
    assert [line[:2] for line in shown(board)] == [["fedavg", "seed=0"], ["sweep", shown(board)[-1][1]]]
    board.begin(1, job(2))
    assert shown(board)[1] == ["fedavg", "seed=2", "d2", "prepares"]  # nothing of the run before


def test_what_ends_leaves_a_line_and_the_terminal_is_left_clean(capsys: pytest.CaptureFixture[str]) -> None:
    board, out = live()
    with pytest.raises(KeyboardInterrupt), board:
        board.begin(0, job(0))
        board.progress(0).finish("done: accuracy 90.0 %")
        board.end(0, job(0), DONE)
        board.note("a note")
        board.begin(0, job(1))
        raise KeyboardInterrupt
    assert "fedavg seed=0 d0: done: accuracy 90.0 %\n" in out.getvalue()
    assert "a note\n" in out.getvalue()
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1  # the cursor


def test_without_a_terminal_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_board("rich", 3, 1)) is LinesBoard
    answer = call("train", "-m", *TINY, "rounds=1", "baseline=fedavg,fedprox", "ui=rich")
    told = [line for line in answer.out.splitlines() if line.startswith("sweep: ")]
    assert told[0].startswith("sweep: 1 of 2 done, about 0:0")
    assert told[1] == "sweep: 2 of 2 done"


def test_nothing_is_shown_with_ui_none() -> None:
    line = ("-m", *TINY, "rounds=1", "baseline=fedavg,fedprox", "ui=none")
    answer = call("train", *line)
    *table, last = answer.out.splitlines()
    assert last.startswith("sweep: /")
    assert table[0].split()[0] == "method"
    assert answer.err == ""
    assert call("train", *line).err == ""


def test_the_last_round_is_read_from_the_end_of_a_table(tmp_path: Path) -> None:
    assert last_round(tmp_path) is None
    run = done(*TINY, "baseline=fedavg")
    found = [row for row in rows(run / "metrics.csv") if row["scope"] == "global"][-1]
    moved = sum(int(found[name]) for name in ("bytes_up", "bytes_down", "bytes_peer"))
    assert last_round(run) == (4, float(found["accuracy"]), moved)
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text + text.splitlines()[-1][:20])  # half a row
    assert last_round(run) == (4, float(found["accuracy"]), moved)
    (run / "metrics.csv").write_text(text.splitlines()[0] + "\n")
    assert last_round(run) is None
