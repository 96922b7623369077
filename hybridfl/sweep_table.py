"""The jobs of a sweep on disk: ``runs.csv``, a row for each, kept whole while the sweep works."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridfl.errors import DataError
from hybridfl.store import write_text_atomic

COLUMNS = ("run", "status", "method", "overrides", "error", "cell")
BETWEEN = " | "
"""Stands between the names of cells where a job belongs to several."""
WAY_OUT = "the sweep's line makes it anew"


@dataclass(frozen=True)
class Row:
    """A job.

    Attributes:
        run: the name of its folder below ``runs``, or that it would have; empty if it has none.
        status: ``pending``, ``done``, ``failed`` or ``skipped``.
        cells: names of the preset's cells that the job belongs to; empty without a preset that has any.
    """

    run: str
    status: str
    method: str
    overrides: str
    error: str = ""
    cells: tuple[str, ...] = ()


def write_line(folder: Path, typed: Sequence[str], config_dir: Path | None) -> None:
    """What was typed, a word a line, and the user's config folder.

    Raises:
        StoreError: it cannot be written.
    """
    write_text_atomic(folder / "overrides.txt", "\n".join(typed) + "\n")
    if config_dir is not None:
        write_text_atomic(folder / "config_dir.txt", f"{config_dir}\n")


def typed_line(folder: Path) -> str:
    """The whole command, quoted as a shell needs it."""
    try:
        words = (folder / "overrides.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "(unknown)"
    own = folder / "config_dir.txt"
    config_dir = ["--config-dir", own.read_text(encoding="utf-8").strip()] if own.is_file() else []
    return shlex.join(["hybridfl", "train", "-m", *config_dir, *words])


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Replaces the sweep's ``runs.csv``.

    Raises:
        StoreError: it cannot be written; the old one is untouched.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([row.run, row.status, row.method, row.overrides, row.error, BETWEEN.join(row.cells)])
    write_text_atomic(folder / "runs.csv", text.getvalue())


def read_rows(folder: Path) -> list[Row]:
    """The rows of a sweep's ``runs.csv``; columns that an older file lacks are empty.

    Raises:
        DataError: it is missing or no table of jobs.
    """
    path = folder / "runs.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{path}: cannot be read ({problem}); {WAY_OUT}.") from problem
    if not found or not {"run", "status"} <= found[0].keys():
        raise DataError(f"{path}: has no jobs with their run and status; {WAY_OUT}.")
    return [_row({column: row.get(column) or "" for column in COLUMNS}) for row in found]


def _row(texts: dict[str, str]) -> Row:
    cells = tuple(filter(None, texts.pop("cell").split(BETWEEN)))
    return Row(**texts, cells=cells)
