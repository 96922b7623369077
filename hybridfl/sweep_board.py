"""What a person sees while a sweep works."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from hybridfl.progress import Progress, make_progress
from hybridfl.sweep_jobs import Job, Outcome


class LinesBoard:
    """The lines of each run, as of runs by themselves; failures at once.

    Args:
        ui: as in the config.
        alone: whether one run works at a time, so that it may have a live line.
    """

    def __init__(self, ui: str, alone: bool) -> None:
        self._ui = ui if alone or ui != "rich" else "plain"
        self._progress: dict[int, Progress] = {}

    def progress(self, slot: int) -> Progress:
        if slot not in self._progress:
            self._progress[slot] = make_progress(self._ui)
        return self._progress[slot]

    def begin(self, slot: int, job: Job) -> None:
        """Says nothing; the run does."""

    def end(self, slot: int, job: Job, outcome: Outcome) -> None:
        """A failure, in red where there is colour; the traceback of a mistake in the code is in the run's own log."""
        if outcome.status == "failed":
            text = f"failed: {job.line}: {outcome.error}"
            print(f"\x1b[31m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """What is good to know; silent where nothing is to be shown."""
        if self._ui != "none":
            self.note(text)

    def note(self, text: str) -> None:
        self.progress(0).note(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for progress in self._progress.values():
            progress.__exit__(kind, error, trace)
