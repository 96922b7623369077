"""``hybridfl sweeps``: what was swept, and how far it got."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

from hybridfl.errors import ConfigError, DataError, nearest
from hybridfl.progress import megabytes
from hybridfl.run_files import attempts_in, size_of, state_of
from hybridfl.sweep_table import Row, read_rows, typed_line

STATES = ("done", "failed", "running", "stopped", "missing", "skipped")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl sweeps``."""
    parser.add_argument(
        "what",
        nargs="?",
        metavar="OUTPUT_DIR|DIGEST",
        help="an output folder (default: outputs), or one sweep: its jobs",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="of the DIGEST (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit status."""
    folder = Path(args.what) if args.what else args.output_dir
    if (folder / "runs.csv").is_file():
        print(jobs_of(folder))
    elif folder.is_dir() or not args.what:
        print(sweeps_in(folder))
    else:
        print(jobs_of(_sweep(args.what, args.output_dir)))
    return 0


@dataclass(frozen=True)
class _Runs:
    """The runs of an output folder; each is looked at once, however many sweeps it belongs to."""

    folder: Path

    @cached_property
    def attempts(self) -> dict[str, list[Path]]:
        return attempts_in(self.folder)

    @cached_property
    def _states(self) -> dict[str, str]:
        return {}

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {}

    def state(self, row: Row) -> str:
        """How far a job is; what its folder says counts, as another sweep may have gone on with it."""
        if not row.run:
            return row.status if row.status in STATES else "missing"
        digest = row.run.partition("-")[0]
        if digest not in self._states:
            self._states[digest] = state_of(self.attempts.get(digest, []))
        state = self._states[digest]
        # A killed worker could not say so itself.
        return "failed" if row.status == "failed" and state in ("stopped", "missing") else state

    def size(self, row: Row) -> int:
        digest = row.run.partition("-")[0]
        if digest not in self._sizes:
            self._sizes[digest] = sum(map(size_of, self.attempts.get(digest, [])))
        return self._sizes[digest]


def sweeps_in(output: Path) -> str:
    """A line for every sweep, the newest last.

    Raises:
        ConfigError: there is no such folder.
    """
    if not output.is_dir():
        raise ConfigError(str(output), "is no folder; name the output folder of a sweep.")
    sweeps = output / "sweeps"
    found = [folder for folder in sweeps.iterdir() if (folder / "runs.csv").is_file()] if sweeps.is_dir() else []
    if not found:
        return f"no sweep in '{output}'"
    runs = _Runs(output / "runs")
    lines = [["sweep", "when", "jobs", "done", "failed", "missing", "skipped", "size", "line"]]
    for folder in sorted(found, key=_when):
        try:
            rows = read_rows(folder)
        except DataError as problem:
            lines.append([folder.name, "", "", "", "", "", "", "", str(problem)])
            continue
        states = Counter(map(runs.state, rows))
        missing = len(rows) - states["done"] - states["failed"] - states["skipped"]
        size = sum(runs.size(row) for row in {row.run: row for row in rows if row.run}.values())
        numbers = [len(rows), states["done"], states["failed"], missing, states["skipped"]]
        when = datetime.fromtimestamp(_when(folder)).strftime("%Y-%m-%d %H:%M")
        lines.append([folder.name, when, *map(str, numbers), megabytes(size), typed_line(folder)])
    return "\n".join(_aligned(lines, right=range(2, 8)))


def jobs_of(folder: Path) -> str:
    """A line for every job of a sweep.

    Raises:
        DataError: its table cannot be read.
    """
    rows = read_rows(folder)
    runs = _Runs(folder.resolve().parent.parent / "runs")
    shared = _shared(rows)
    named = any(row.cells for row in rows)
    lines = [["run", "status", "method", *(["cell"] if named else []), "size", "overrides"]]
    for row in rows:
        own = " ".join(text for text in row.overrides.split() if text not in shared)
        cell = [" | ".join(row.cells)] if named else []
        size = megabytes(runs.size(row)) if row.run else ""
        lines.append([row.run or "–", runs.state(row), row.method, *cell, size, own])
        if row.error:
            lines[-1][-1] += f"  ({row.error.splitlines()[0]})"
    states = Counter(map(runs.state, rows))
    told = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    head = [f"sweep     {folder.name}", f"line      {typed_line(folder)}", f"jobs      {len(rows)}: {told}"]
    head += [f"all with  {' '.join(shared)}"] if shared else []
    return "\n".join([*head, "", *_aligned(lines, right=[4 if named else 3])])


def _shared(rows: list[Row]) -> list[str]:
    """Overrides that all jobs have, if there are several."""
    if len(rows) < 2:
        return []
    common = set(rows[0].overrides.split()).intersection(*(row.overrides.split() for row in rows))
    return [text for text in rows[0].overrides.split() if text in common]


def _when(folder: Path) -> float:
    return (folder / "runs.csv").stat().st_mtime


def _sweep(name: str, output: Path) -> Path:
    sweeps = output / "sweeps"
    names = sorted(folder.name for folder in sweeps.iterdir()) if sweeps.is_dir() else []
    found = [digest for digest in names if digest.startswith(name)]
    if name in found:
        found = [name]
    if len(found) > 1:
        raise ConfigError(name, f"several sweeps in '{sweeps}' begin so: {', '.join(found)}. Type more of the digest.")
    if not found:
        problem = f"is no output folder, and no sweep in '{sweeps}' is called so. {nearest(name, names)}"
        raise ConfigError(name, problem.rstrip())
    return sweeps / found[0]


def _aligned(table: list[list[str]], right: range | list[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
