"""A sweep: every job checked before the first starts, finished ones shared, a failing one does not stop the others."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hybridfl.config import Composer
from hybridfl.errors import ConfigError
from hybridfl.plan import DataCache, Settings, settings_of
from hybridfl.preset_sweeps import ONLY
from hybridfl.store import is_busy, make_folder
from hybridfl.sweep_board import make_board
from hybridfl.sweep_disk import disk_notes
from hybridfl.sweep_entry import Entry, Finished, checked
from hybridfl.sweep_jobs import Board, Job, Outcome
from hybridfl.sweep_line import sweep_line
from hybridfl.sweep_table import write_line, write_rows
from hybridfl.sweep_work import workforce


def sweep(overrides: Sequence[str], config_dir: Path | None) -> Finished:
    """All jobs of an ``-m`` line.

    Raises:
        ConfigError: some job's config is wrong; none has been started.
        KeyboardInterrupt: stopped; the same line goes on where it was.
    """
    line = sweep_line(overrides)
    if line.sweeper:
        from hybridfl.search import search

        return search(line, line.sweeper, config_dir)
    cache = DataCache()
    with Composer(config_dir) as composer:
        cells = cells_of_jobs(composer, line.overrides)
        composed = {job: composer.compose(job) for job in cells}
    entries = [replace(checked(composed[job], cache), cells=names) for job, names in cells.items()]
    if all(entry.status == "skipped" for entry in entries):
        raise ConfigError("", f"every job of the sweep was skipped; the first: {entries[0].error}")
    settings, _ = settings_of(entries[0].composed)
    folder = Path(settings.output_dir) / "sweeps" / _digest(entries)
    make_folder(folder)
    write_line(folder, overrides, config_dir)
    todo = [entry.composed for entry in entries if entry.status == "pending"]
    force = workforce(line.launcher, todo, settings, folder, cache)
    sizes = {entry.digest: entry.size for entry in entries if entry.status == "pending"}
    with make_board(settings.ui, len(sizes), force.number) as board:
        if before := sum(entry.status == "done" for entry in entries):
            board.say(f"{before} of the sweep's {len(entries)} jobs are finished already.")
        if sizes:
            told, warning = disk_notes(folder, len(sizes), sum(sizes.values()))
            board.say(told)
            if warning:
                board.note(warning)
        for entry in entries:
            if entry.status == "skipped":
                board.note(f"skipped: {entry.composed.line}: {entry.error}")
        for note in force.notes:
            board.note(note)
        jobs = Jobs(entries, settings, folder, board)
        force.work(jobs, board)
    left = sum(entry.status == "pending" for entry in entries)
    return Finished(folder, sum(entry.status == "failed" for entry in entries), left)


def cells_of_jobs(composer: Composer, overrides: Sequence[str]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The jobs of an ``-m`` line in their order, each with the names of the preset's cells that it belongs to.

    Raises:
        ConfigError: as in :meth:`Composer.cells`.
    """
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name, jobs in composer.cells(overrides).items():
        for job in map(tuple, jobs):
            found[job] = (*found.get(job, ()), *([name] if name != ONLY else []))
    return found


class Jobs:
    """The jobs that are to be done, and the sweep's table as they end.

    Jobs that are the same run are one. One that another process works on is put off until all others are done, and then
    waited for.

    Args:
        entries: of the sweep; those that end are replaced in it.
    """

    def __init__(self, entries: list[Entry], settings: Settings, folder: Path, board: Board) -> None:
        self._entries, self._folder, self._board = entries, folder, board
        self._output, self._rerun, self._fail_fast = Path(settings.output_dir), settings.rerun, settings.fail_fast
        first: dict[str, int] = {}
        for place, entry in enumerate(entries):
            if entry.status == "pending":
                first.setdefault(entry.digest, place)
        self._waiting = deque(first.values())
        self._put_off: set[int] = set()
        self._under_way = 0
        self.stopped = False
        self._write()

    def take(self) -> Job | None:
        for _ in range(len(self._waiting)):
            place = self._waiting[0]
            entry = self._entries[place]
            if not is_busy(self._output, entry.digest, self._rerun):
                return self._begun()
            if place not in self._put_off:
                self._put_off.add(place)
                self._board.note(f"put off: {entry.composed.line}: another process works on it.")
            self._waiting.rotate(-1)
        return self._begun() if self._waiting and not self._under_way else None

    def _begun(self) -> Job:
        self._under_way += 1
        place = self._waiting.popleft()
        entry = self._entries[place]
        return Job(place, entry.composed, entry.digest)

    def finish(self, job: Job, outcome: Outcome) -> None:
        self._under_way -= 1
        for place, entry in enumerate(self._entries):
            if entry.digest == job.digest:
                run = outcome.run if outcome.status != "pending" else entry.run
                self._entries[place] = replace(entry, run=run, status=outcome.status, error=outcome.error)
        self._write()
        self.stopped |= outcome.status == "failed" and self._fail_fast

    def _write(self) -> None:
        write_rows(self._folder, (entry.row for entry in self._entries))


def _digest(entries: Sequence[Entry]) -> str:
    lines = [entry.digest or entry.composed.line for entry in entries]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
