"""Progress: few lines, flushed, on the right stream; a live line only on a terminal, which is left clean."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from hybridfl.errors import ConfigError
from hybridfl.progress import PlainProgress, RichProgress, duration, make_progress, megabytes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with PlainProgress(clock) as progress:
        progress.start("fedavg seed=1", 4, 0)
        for done, accuracy in enumerate((None, 0.5, None, 0.8125), 1):
            clock.now += 30
            progress.round(done, accuracy, done * 1_500_000)
        progress.note("client 3 dropped out")
        progress.finish("done in 2:00")
    assert capsys.readouterr().out.splitlines() == [
        "fedavg seed=1: 4 rounds",
        "fedavg seed=1: round 1/4  1.5 MB  1:30 left",
        "fedavg seed=1: round 2/4  accuracy 50.0 %  3.0 MB  1:00 left",
        "fedavg seed=1: round 3/4  accuracy 50.0 %  4.5 MB  0:30 left",
        "fedavg seed=1: round 4/4  accuracy 81.2 %  6.0 MB",
        "client 3 dropped out",
        "fedavg seed=1: done in 2:00",
    ]


@pytest.mark.parametrize("rounds", [1, 19, 20, 21, 60, 399, 10_000])
@pytest.mark.parametrize("resumed", [False, True])
def test_plain_is_short_however_long_the_run(capsys: pytest.CaptureFixture[str], rounds: int, resumed: bool) -> None:
    first = rounds // 2 if resumed else 0
    progress = make_progress("plain")
    progress.start("run", rounds, first)
    for done in range(first + 1, rounds + 1):
        progress.round(done, 0.5, 0)
    progress.finish("done")
    lines = capsys.readouterr().out.splitlines()
    shown = [int(found[1]) for line in lines if (found := re.search(r"round (\d+)/", line))]
    assert shown[0] == first + 1
    assert shown[-1] == rounds
    assert len(shown) <= 22
    assert lines[0] == (f"run: continues after round {first} of {rounds}" if first else f"run: {rounds} rounds")


def test_time_left_counts_only_rounds_of_this_start(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = PlainProgress(clock)
    progress.start("run", 100, 90)
    clock.now += 2
    progress.round(91, None, 0)
    assert "round 91/100  0.0 MB  0:18 left" in capsys.readouterr().out


def test_runs_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress("plain")
    for title in ("a", "b"):
        progress.start(title, 1, 0)
        progress.round(1, None if title == "b" else 0.5, 0)
    assert capsys.readouterr().out.splitlines()[-1] == "b: round 1/1  0.0 MB"  # not the accuracy of a


def test_plain_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
    make_progress("plain").start("run", 3, 0)
    assert raw.getvalue() == b"run: 3 rounds\n"


def test_none_says_notes_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress("none") as progress:
        progress.start("run", 3, 0)
        progress.round(3, 0.5, 0)
        progress.note("careful")
        progress.finish("done")
    assert capsys.readouterr() == ("", "careful\n")


def test_rich_is_plain_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert type(make_progress("rich")) is PlainProgress


def test_unknown_ui() -> None:
    with pytest.raises(ConfigError, match=r"ui: 'ritch' is unknown\. Did you mean 'rich'"):
        make_progress("ritch")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_as_stdout(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called inside a test: between fixtures and test pytest puts its own standard output back."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def test_rich_shows_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stdout(monkeypatch)
    with make_progress("rich") as progress:
        assert isinstance(progress, RichProgress)
        progress.start("fedavg [seed=1] {x}", 4, 1)
        progress.round(2, 0.5, 3_000_000)
        progress.note("client [3] dropped out")
        progress.round(3, None, 6_000_000)
        progress.finish("done [ok]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "fedavg [seed=1] {x}" in text
    assert "client [3] dropped out\n" in text
    assert re.search(r"3/4 +accuracy 50\.0 % +6\.0 MB", text)
    assert text.rstrip().endswith("fedavg [seed=1] {x}: done [ok]")


def test_ctrl_c_leaves_the_terminal_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_as_stdout(monkeypatch)
    with pytest.raises(KeyboardInterrupt), make_progress("rich") as progress:
        progress.start("run", 4, 0)
        progress.round(1, 0.5, 0)
        raise KeyboardInterrupt
    text = terminal.getvalue()
    assert HIDE_CURSOR in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    assert text.rstrip().endswith("\x1b[2K")  # the live line is erased
    progress.round(2, 0.5, 0)  # a late report draws nothing
    assert terminal.getvalue() == text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_as_stdout(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_progress("rich")) is PlainProgress


def test_rich_is_imported_only_where_it_is_shown() -> None:
    code = (
        "import sys; from hybridfl.progress import make_progress;"
        "[make_progress(ui) for ui in ('rich', 'plain', 'none')]; sys.exit('rich' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ, check=False).returncode
        == 0
    )


def test_units() -> None:
    assert [megabytes(count) for count in (0, 1_250_000, 999_900_000, 2_500_000_000)] == [
        "0.0 MB",
        "1.2 MB",
        "999.9 MB",
        "2.50 GB",
    ]
    assert [duration(seconds) for seconds in (0.4, 59.6, 3600, 7325)] == ["0:00", "1:00", "1:00:00", "2:02:05"]
