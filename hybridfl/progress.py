"""What a person sees while a run works: one live line, a few plain lines, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from hybridfl.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as LiveLine
    from rich.progress import TaskID

LINES = 20
"""Plain lines a run may print between its first and its last."""


class Progress(Protocol):
    """Reports of one run after the other; a context manager, so that the terminal is left clean whatever happens."""

    def start(self, title: str, rounds: int, done: int, about: str = "") -> None:
        """A run begins, or continues after ``done`` of its ``rounds``; ``about`` is said once."""

    def round(self, done: int, accuracy: float | None, bytes_moved: int) -> None:
        """``done`` rounds are finished; ``accuracy`` in [0, 1] is None where the round was not evaluated."""

    def note(self, text: str) -> None:
        """Something worth a line of its own: a warning, a client that failed."""

    def finish(self, text: str) -> None:
        """The run is over, for the reason in ``text``."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_progress(ui: str) -> Progress:
    """``rich``: one live line, on a terminal only, else as ``plain``; ``plain``: some lines; ``none``: only notes.

    Raises:
        ConfigError: ``ui`` is none of the three.
    """
    if ui == "rich":
        return RichProgress.on_terminal() or PlainProgress()
    if ui == "plain":
        return PlainProgress()
    if ui == "none":
        return NoProgress()
    raise ConfigError("ui", f"'{ui}' is unknown. {nearest(ui, ('rich', 'plain', 'none'))}")


class NoProgress:
    """Silence, except for notes on standard error."""

    def start(self, title: str, rounds: int, done: int, about: str = "") -> None:
        """Says nothing."""

    def round(self, done: int, accuracy: float | None, bytes_moved: int) -> None:
        """Says nothing."""

    def note(self, text: str) -> None:
        """One line on standard error."""
        print(text, file=sys.stderr, flush=True)

    def finish(self, text: str) -> None:
        """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PlainProgress(NoProgress):
    """Lines on standard output, flushed so that a log file grows while the run works.

    Args:
        clock: seconds from any origin; another one in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._title = ""
        self._rounds = self._first = 0
        self._last: int | None = None  # the round of the last line
        self._accuracy: float | None = None
        self._began = 0.0

    def start(self, title: str, rounds: int, done: int, about: str = "") -> None:
        """One line; later ones repeat the title, as parallel runs may share one log."""
        self._title, self._rounds, self._first, self._last = title, rounds, done, None
        self._accuracy, self._began = None, self._clock()
        begins = f"{rounds} rounds" if not done else f"continues after round {done} of {rounds}"
        self._say(", ".join(filter(None, [begins, about])))

    def round(self, done: int, accuracy: float | None, bytes_moved: int) -> None:
        """A line for the first and the last round, and for about every twentieth part between."""
        if accuracy is not None:
            self._accuracy = accuracy
        step = -(-(self._rounds - self._first) // LINES)
        if self._last is None or done - self._last >= step or done >= self._rounds:
            self._last = done
            facts = [_accuracy(self._accuracy), megabytes(bytes_moved), self._left(done)]
            self._say("  ".join([f"round {done}/{self._rounds}", *filter(None, facts)]))

    def note(self, text: str) -> None:
        """One line among the others."""
        print(text, flush=True)

    def finish(self, text: str) -> None:
        """The last line."""
        self._say(text)

    def _left(self, done: int) -> str:
        if done <= self._first or done >= self._rounds:
            return ""
        return f"{duration((self._clock() - self._began) / (done - self._first) * (self._rounds - done))} left"

    def _say(self, text: str) -> None:
        print(f"{self._title}: {text}" if self._title else text, flush=True)


class RichProgress(NoProgress):
    """One live line at the bottom of a terminal, replaced by one lasting line when the run is over."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title = ""
        self._live: LiveLine | None = None
        self._task: TaskID | None = None

    @classmethod
    def on_terminal(cls) -> RichProgress | None:
        """A live line on standard output, or None where that cannot show one."""
        console = cls.console()
        return cls(console) if console else None

    @staticmethod
    def console() -> Console | None:
        """Standard output as a terminal that can show live lines, or None."""
        if not sys.stdout.isatty():
            return None
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False)
        return console if console.is_terminal and not console.is_dumb_terminal else None

    def start(self, title: str, rounds: int, done: int, about: str = "") -> None:
        """Shows the line."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._stop()
        self._title = title
        if about:
            self._console.print(f"{title}: {about}", soft_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]}"),
            TextColumn("{task.fields[moved]}"),
            TimeRemainingColumn(),
        )
        self._live = Progress(*columns, console=self._console, transient=True)
        self._task = self._live.add_task(title, total=rounds, completed=done, accuracy="", moved="")
        self._live.start()

    def round(self, done: int, accuracy: float | None, bytes_moved: int) -> None:
        """Moves the line on; the accuracy stays until there is a new one."""
        if self._live is None or self._task is None:
            return
        self._live.update(self._task, completed=done, moved=megabytes(bytes_moved))
        if accuracy is not None:
            self._live.update(self._task, accuracy=_accuracy(accuracy))

    def note(self, text: str) -> None:
        """One lasting line above the live one."""
        self._console.print(text, soft_wrap=True)

    def finish(self, text: str) -> None:
        """Takes the live line away and leaves ``text``."""
        self._stop()
        self._console.print(f"{self._title}: {text}" if self._title else text, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        """Ends the live display: the cursor is visible again and the line is gone, after Ctrl-C as well."""
        live, self._live, self._task = self._live, None, None
        if live is not None:
            live.stop()


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"accuracy {100 * value:.1f} %"


def megabytes(count: int) -> str:
    """Bytes for people; decimal units, as everywhere in the tables."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
