"""What trackers are told: the rows of ``metrics.csv`` under names that are the same everywhere.

A tracker may fail or be missing for a while; what it lacks is sent from ``metrics.csv`` when the run is continued, or by
``hybridfl track`` afterwards. So a tracker holds every evaluated round once, whatever happened in between.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from hybridfl.runs import COSTS
from hybridfl.trackers import Ending, Session, Tracked, Tracker

LAST_NAME = "costs/seconds"
"""The name that comes last in every round and is in all of them: a tracker that has it has the whole round."""
UNREADABLE = re.compile(r"[^/\w.\- :]")


def readable(name: str) -> str:
    """A name that every tracker takes: ``domain=usps`` is ``domain:usps``, and what MLflow refuses is ``_``."""
    return UNREADABLE.sub("_", name.replace("=", ":"))


def named(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of one round: ``SCOPE/COLUMN``, and ``costs/COLUMN`` for what is the same in every scope.

    Args:
        rows: of ``metrics.csv``, as numbers or as text; cells that are empty or NaN are left out.
    """
    found: dict[str, float] = {}
    costs: dict[str, float] = {}
    for row in rows:
        for column, cell in row.items():
            value = _number(cell)
            if column in ("round", "scope") or value is None:
                continue
            if column in COSTS:
                costs[f"costs/{column}"] = value
            else:
                found[readable(f"{row['scope']}/{column}")] = value
    last = {LAST_NAME: costs.pop(LAST_NAME)} if LAST_NAME in costs else {}
    return found | costs | last


def _number(cell: Any) -> float | None:
    if cell is None or cell == "":
        return None
    with suppress(TypeError, ValueError):
        value = float(cell)
        return None if value != value else value
    return None


def past(table: Path) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """The rounds of a ``metrics.csv``, with their rows."""
    with table.open(newline="", encoding="utf-8") as file:
        for round, rows in groupby(csv.DictReader(file), key=lambda row: row["round"]):
            yield int(round), list(rows)


class Tracking:
    """A run and its tracker, which can fail without harm to the run: that is told once.

    Args:
        tracker: what is told.
        run: the run; what its ``metrics.csv`` has of rounds up to ``after`` and the tracker has not is sent at once.
        on_note: is told of a failure.
        after: the last round that is not computed again; None: all of them.

    Attributes:
        failed: whether the tracker has failed.
    """

    def __init__(
        self, tracker: Tracker, run: Tracked, on_note: Callable[[str], None], after: int | None = None
    ) -> None:
        self.failed = False
        self._name, self._run, self._on_note = type(tracker).__name__, run, on_note
        self._session: Session | None = None
        self._tried(lambda: self._begin(tracker, after))

    def send(self, round: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """The rows of a round, unless the tracker has them."""
        self._tried(lambda: self._send(round, rows))

    def end(self, ending: Ending) -> None:
        """Nothing more comes."""
        session, self._session = self._session, None
        if session is not None:
            self._tried(lambda: session.close(ending))

    def _begin(self, tracker: Tracker, after: int | None) -> None:
        self._session = session = tracker.open(self._run)
        table = self._run.folder / "metrics.csv"
        if after is not None and after <= session.last:
            return
        for round, rows in past(table):
            if after is None or round <= after:
                self._send(round, rows)

    def _send(self, round: int, rows: Iterable[Mapping[str, Any]]) -> None:
        if self._session is not None and round > self._session.last:
            self._session.log(round, named(rows))

    def _tried(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of a foreign package, a full disk or a network; the results are what counts
            self.failed, self._session = True, None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._on_note(
                f"{self._name} failed: {reason[:500]}; nothing more is sent to it, and no result is lost: "
                f"hybridfl track {self._run.folder} tracker=… sends it later"
            )
