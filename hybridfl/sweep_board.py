"""What a person sees while a sweep works: a live board, plain lines, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hybridfl.progress import NoProgress, Progress, RichProgress, duration, make_progress
from hybridfl.sweep_jobs import Job, Outcome

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live


@dataclass
class Tally:
    """How far a sweep is.

    Attributes:
        total: jobs to do.
        workers: at a time.
        clock: seconds from any origin.
    """

    total: int
    workers: int
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    failed: int = 0
    _begun: dict[int, float] = field(default_factory=dict)
    _took: list[float] = field(default_factory=list)

    def begin(self, slot: int) -> None:
        self._begun[slot] = self.clock()

    def end(self, slot: int, outcome: Outcome) -> None:
        took = self.clock() - self._begun.pop(slot)
        self.done += outcome.status == "done"
        self.failed += outcome.status == "failed"
        if outcome.status == "done":
            self._took.append(took)

    @property
    def running(self) -> int:
        return len(self._begun)

    def seconds_left(self) -> float | None:
        """As if the others took what finished ones did on average; None before the first."""
        if not self._took:
            return None
        mean, now = sum(self._took) / len(self._took), self.clock()
        under_way = sum(max(0.0, mean - (now - begun)) for begun in self._begun.values())
        waiting = max(0, self.total - self.done - self.failed - self.running)
        return (under_way + waiting * mean) / self.workers

    def __str__(self) -> str:
        left = self.seconds_left() if self.done + self.failed < self.total else None
        parts = [f"{self.done} of {self.total} done"]
        parts += [f"{self.running} running"] if self.running else []
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"about {duration(left)} left"] if left is not None else []
        return ", ".join(parts)


class LinesBoard:
    """The lines of each run, as of runs by themselves, and one of the sweep after each; failures at once."""

    def __init__(self, ui: str, tally: Tally) -> None:
        self._ui, self.tally = ui, tally
        self._progress: dict[int, Progress] = {}

    def progress(self, slot: int) -> Progress:
        if slot not in self._progress:
            self._progress[slot] = self._made(slot)
        return self._progress[slot]

    def _made(self, slot: int) -> Progress:
        return make_progress("plain" if self._ui == "rich" else self._ui)

    def begin(self, slot: int, job: Job) -> None:
        self.tally.begin(slot)

    def end(self, slot: int, job: Job, outcome: Outcome) -> None:
        """A failure, in red where there is colour; the traceback of a mistake in the code is in the run's own log."""
        self.tally.end(slot, outcome)
        if outcome.status == "failed":
            text = f"failed: {job.line}: {outcome.error}"
            print(f"\x1b[31m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
        self._count()

    def _count(self) -> None:
        if self.tally.total > 1:
            self.say(f"sweep: {self.tally}")

    def say(self, text: str) -> None:
        """What is good to know; silent where nothing is to be shown."""
        if self._ui != "none":
            self.note(text)

    def note(self, text: str) -> None:
        self.progress(-1).note(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for progress in self._progress.values():
            progress.__exit__(kind, error, trace)


class LiveBoard(LinesBoard):
    """A line for each run under way and one for the sweep, at the bottom of a terminal; a lasting line for each that ends."""

    def __init__(self, tally: Tally, console: Console) -> None:
        super().__init__("rich", tally)
        self._console = console
        self._live: Live | None = None
        self._rows: dict[int, SlotProgress] = {}

    def _made(self, slot: int) -> Progress:
        return SlotProgress(self._console)

    def begin(self, slot: int, job: Job) -> None:
        super().begin(slot, job)
        row = self.progress(slot)
        assert isinstance(row, SlotProgress)
        row.begin(job.title)
        self._rows[slot] = row

    def end(self, slot: int, job: Job, outcome: Outcome) -> None:
        self._rows.pop(slot, None)
        super().end(slot, job, outcome)

    def _count(self) -> None:
        """The live line says it."""

    def picture(self) -> RenderableType:
        """What is shown now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        rows = Table.grid(padding=(0, 2), pad_edge=False)
        for _, row in sorted(self._rows.items()):
            rows.add_row(*row.cells())
        over = self.tally.done + self.tally.failed
        whole = Table.grid(padding=(0, 2))
        whole.add_row("sweep", ProgressBar(max(1, self.tally.total), over, width=30), str(self.tally))
        return Group(rows, whole) if self._rows else whole

    def __enter__(self) -> Self:
        from rich.live import Live

        self._live = Live(console=self._console, get_renderable=self.picture, refresh_per_second=4, transient=True)
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()


class SlotProgress(NoProgress):
    """What is known of the run that a worker has under way."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.begin("")

    def begin(self, title: str) -> None:
        """Another run, of which no more is known yet."""
        self.title, self.rounds, self.done = title, 0, 0
        self.accuracy: float | None = None

    def start(self, title: str, rounds: int, done: int, about: str = "") -> None:
        self.title, self.rounds, self.done, self.accuracy = title, rounds, done, None

    def round(self, done: int, accuracy: float | None, bytes_moved: int) -> None:
        self.done = done
        self.accuracy = self.accuracy if accuracy is None else accuracy

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def finish(self, text: str) -> None:
        self._console.print(f"{self.title}: {text}", soft_wrap=True)

    def cells(self) -> tuple[str, str, str]:
        """Title, round and accuracy."""
        rounds = f"round {self.done}/{self.rounds}" if self.rounds else "prepares"
        return self.title, rounds, "" if self.accuracy is None else f"accuracy {100 * self.accuracy:.1f} %"


def make_board(ui: str, total: int, workers: int) -> LinesBoard:
    """``rich``: live, on a terminal only, else as ``plain``.

    Args:
        total: jobs to do.
        workers: at a time.
    """
    tally = Tally(total, workers)
    console = RichProgress.console() if ui == "rich" else None
    return LiveBoard(tally, console) if console else LinesBoard(ui, tally)
