"""A sweep: every job checked before the first starts, finished ones shared, a failing one does not stop the others."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hybridfl.config import Composed, Composer
from hybridfl.engine import Unsuitable
from hybridfl.errors import ConfigError, DataError
from hybridfl.experiment import RunFailed, run
from hybridfl.plan import DataCache, make_plan, settings_of
from hybridfl.preset_sweeps import ONLY
from hybridfl.progress import Progress, make_progress
from hybridfl.store import make_folder, write_text_atomic
from hybridfl.sweep_table import Row, write_rows


@dataclass(frozen=True)
class Entry:
    """A job of a sweep: a row of its ``runs.csv``."""

    composed: Composed
    digest: str
    cells: tuple[str, ...] = ()
    run: str = ""
    status: str = "pending"
    error: str = ""

    @property
    def row(self) -> Row:
        name, composed = self.run or self.digest, self.composed
        return Row(name, self.status, composed.method_name, composed.line, self.error, self.cells)


@dataclass(frozen=True)
class Finished:
    """How a sweep ended: its folder, and the jobs that failed."""

    folder: Path
    failed: int


def sweep(overrides: Sequence[str], config_dir: Path | None) -> Finished:
    """All jobs of an ``-m`` line.

    Raises:
        ConfigError: some job's config is wrong; none has been started.
        KeyboardInterrupt: stopped; the same line goes on where it was.
    """
    cache = DataCache()
    with Composer(config_dir) as composer:
        cells = cells_of_jobs(composer, overrides)
        composed = {job: composer.compose(job) for job in cells}
    entries = [replace(_checked(composed[job], cache), cells=names) for job, names in cells.items()]
    if all(entry.status == "skipped" for entry in entries):
        raise ConfigError("", f"every job of the sweep was skipped; the first: {entries[0].error}")
    settings, _ = settings_of(entries[0].composed)
    folder = Path(settings.output_dir) / "sweeps" / _digest(entries)
    make_folder(folder)
    write_text_atomic(folder / "overrides.txt", "\n".join(overrides) + "\n")
    write_rows(folder, (entry.row for entry in entries))
    with make_progress(settings.ui) as progress:
        for entry in entries:
            if entry.status == "skipped":
                progress.note(f"skipped: {entry.composed.line}: {entry.error}")
        for i, entry in enumerate(entries):
            if entry.status == "skipped":
                continue
            entries[i] = _run(entry, cache, progress)
            write_rows(folder, (entry.row for entry in entries))
            if entries[i].status == "failed" and settings.fail_fast:
                break
    return Finished(folder, sum(entry.status == "failed" for entry in entries))


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


def _checked(composed: Composed, cache: DataCache) -> Entry:
    try:
        return Entry(composed, make_plan(composed, cache).digest)
    except Unsuitable as reason:
        return Entry(composed, "", status="skipped", error=str(reason))
    except (ConfigError, DataError) as error:
        where = f"in the job '{composed.line}': " if composed.line else ""
        raise ConfigError("", f"{where}{error}") from error


def _run(entry: Entry, cache: DataCache, progress: Progress) -> Entry:
    try:
        # The plan is made again rather than kept: a thousand federations would not fit into memory.
        path = run(make_plan(entry.composed, cache), progress)
    except Exception as error:
        # At once, and in red where there is colour; the traceback of a mistake in the code is in the run's own log.
        reason = str(error) or type(error).__name__
        text = f"failed: {entry.composed.line}: {reason}"
        print(f"\x1b[31m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
        name = error.path.name if isinstance(error, RunFailed) else entry.digest
        return replace(entry, run=name, status="failed", error=reason)
    return replace(entry, run=path.name, status="done", error="")


def _digest(entries: Sequence[Entry]) -> str:
    lines = [entry.digest or entry.composed.line for entry in entries]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
