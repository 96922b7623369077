"""Append-only CSV tables of a run, keyed by round: a run that was killed and resumed leaves the same bytes.

A resumed run computes the rounds after its checkpoint again. Rows already on disk are compared with the new ones, not
rewritten; rows that a kill tore off are appended. One row is one line, so a torn write is seen by its missing newline.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from hybridfl.store import StoreError, readable_errors, write_all


class Table:
    """A CSV file that only grows.

    Args:
        path: the file; made with its header if it is not there.
        columns: names of the columns, ``round`` first.
        ignore: columns, such as times, that may differ when a round is computed again.
        after: the last round of the checkpoint resumed from. Only rows of later rounds are kept in memory, and only
            those can be appended. None: all rounds.

    Attributes:
        differences: one sentence for each value that came out differently when its round was computed again.

    Raises:
        StoreError: the file cannot be read or written, or is not a table with these columns.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], ignore: Iterable[str] = ("seconds",), after: int | None = None
    ) -> None:
        if not columns or columns[0] != "round" or len(set(columns)) != len(columns):
            raise ValueError(f"The columns of {path} must be distinct and begin with 'round': {list(columns)}")
        self.path = Path(path)
        self.columns = tuple(columns)
        self.differences: list[str] = []
        self._ignore = frozenset(ignore)
        self._after = after  # rises to the last round appended
        self._there: dict[int, list[bytes]] = {}  # lines on disk of rounds that are still to be computed again
        self._last: int | None = None  # the last round on disk
        self._open()

    def append(self, round: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes all rows of a round at once, less those that are there already, which are compared.

        Values may be None, bool, int, float, str, or scalars of numpy or torch; a column that a row lacks stays empty.

        Raises:
            StoreError: the file cannot be written; it is left as it was.
            ValueError: the round is not after the one before, a row names an unknown column, or a value is no scalar.
        """
        if self._after is not None and round <= self._after:
            raise ValueError(f"{self.path}: round {round} comes after round {self._after}")
        new = [self._cells(round, row) for row in rows]
        old = self._take(round)
        self._compare(round, old, new)
        missing = new[len(old) :]
        if missing and (self._last is None or round >= self._last):
            self._write(b"".join(_line(cells) for cells in missing))
            self._last = round
        self._after = round

    def sync(self) -> None:
        """Waits until the rows are on the disk; call it before a checkpoint that relies on them.

        Raises:
            StoreError: the system could not write them.
        """
        with readable_errors(self.path), open(self.path, "rb+", buffering=0) as file:
            os.fsync(file.fileno())

    # -- reading what is there ----------------------------------------------------------------------------------------

    def _open(self) -> None:
        header = _line(self.columns)
        with readable_errors(self.path):
            self.path.touch()
            with open(self.path, "rb") as file:
                good = self._scan(file, header)
            if good < self.path.stat().st_size:
                os.truncate(self.path, good)
        if good == 0:
            self._write(header)

    def _scan(self, file: BinaryIO, header: bytes) -> int:
        """Reads the rows; returns the length of the file up to the end of its last good line."""
        first = file.readline()
        if first != header:
            if first.endswith(b"\n") or not header.startswith(first):
                shown = first.decode("utf-8", "replace").strip()[:300]
                raise StoreError(f"{self.path} has other columns: {shown!r} instead of {header.decode().strip()!r}.")
            return 0
        good, held = len(first), b""
        for number, line in enumerate(file, start=2):
            if not line.endswith(b"\n"):
                break
            if held:  # not the last line: a kill cannot have torn it
                self._remember(held, number - 1)
                good += len(held)
            held = line
        if held and len(_parse(held)) == len(self.columns) and _round(held) is not None:
            self._remember(held, 0)
            good += len(held)
        return good

    def _remember(self, line: bytes, number: int) -> None:
        round = _round(line)
        if round is None:
            raise StoreError(f"{self.path}, line {number}: a row must begin with its round, found {line[:80]!r}.")
        self._last = round if self._last is None else max(round, self._last)
        if self._after is None or round > self._after:
            self._there.setdefault(round, []).append(line)

    # -- comparing and writing ----------------------------------------------------------------------------------------

    def _take(self, round: int) -> list[bytes]:
        """The lines on disk of this round; reports rounds before it that were there and are now left out."""
        for skipped in sorted(there for there in self._there if there < round):
            self._differ(skipped, f"{len(self._there.pop(skipped))} rows, now none")
        return self._there.pop(round, [])

    def _compare(self, round: int, old: list[bytes], new: list[list[str]]) -> None:
        torn = len(old) < len(new) and (self._last is None or round >= self._last)
        if len(old) != len(new) and not torn:
            self._differ(round, f"{len(old)} rows, now {len(new)}")
        for row, (line, cells) in enumerate(zip(old, new, strict=False), start=1):
            if line == _line(cells):
                continue
            for column, was, now in zip_longest(self.columns, _parse(line)[: len(cells)], cells, fillvalue=""):
                if was != now and column not in self._ignore:
                    self._differ(round, f"{was!r}, now {now!r}", f", row {row}, column {column}")

    def _differ(self, round: int, what: str, where: str = "") -> None:
        self.differences.append(f"{self.path.name}, round {round}{where}: was {what}")

    def _cells(self, round: int, row: Mapping[str, object]) -> list[str]:
        if unknown := [column for column in row if column not in self.columns]:
            raise ValueError(f"{self.path} has no column {unknown[0]!r}, only {', '.join(self.columns)}")
        if row.get("round", round) != round:
            raise ValueError(f"{self.path}: a row of round {row['round']} given as one of round {round}")
        return [str(int(round)), *(_text(row.get(column), column) for column in self.columns[1:])]

    def _write(self, data: bytes) -> None:
        # Opened for each write: once a round costs nothing, and no handle is left open or passed on to workers.
        with readable_errors(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    write_all(descriptor, data)
                except BaseException:
                    with suppress(OSError):  # take back what a full disk accepted of it
                        os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)


def _text(value: object, column: str) -> str:
    """One value, the same text each time: floats as their shortest exact decimal, NaN as an empty cell."""
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()  # a scalar of numpy or torch
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(float(value))
    if isinstance(value, str):
        one_line = re.sub(r"[\r\n]+", " ", str(value))
        return one_line.encode("utf-8", "backslashreplace").decode("utf-8")
    raise ValueError(f"column {column}: a table holds numbers and text, not {type(value).__name__}")


def _line(cells: Sequence[str]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode("utf-8")


def _parse(line: bytes) -> list[str]:
    try:
        return next(csv.reader([line.decode("utf-8", "replace").removesuffix("\n")]), [])
    except csv.Error:
        return []


def _round(line: bytes) -> int | None:
    try:
        return int(line.partition(b",")[0])
    except ValueError:
        return None
