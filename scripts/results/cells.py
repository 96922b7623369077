"""The finished runs of a preset's jobs by its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hybridfl.config import Composer
from hybridfl.plan import DataCache
from hybridfl.runs import Run, read_run
from hybridfl.store import finished_attempt
from hybridfl.sweep_entry import checked
from hybridfl.tabulate import one_a_seed
from hybridfl.tuned import METHOD

Cell = list[Run]
"""The runs of one place in a table, one a seed."""


@dataclass(frozen=True)
class Grid:
    """Rows and columns of a table.

    A sweep with several methods has a row for each and a column for each cell. One whose cells are about a single method each has a
    row for each cell, and a column for each value of what a cell sweeps over.

    Attributes:
        corner: what the rows are.
        cells: runs by row and column; a place that nothing can run in is missing.
        planned: how many runs each place is to have.
    """

    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]
    planned: dict[tuple[str, str], int]

    @property
    def begun(self) -> Grid:
        """Without rows and columns that nothing is finished of."""
        rows = tuple(row for row in self.rows if any(place[0] == row for place in self.cells))
        columns = tuple(column for column in self.columns if any(place[1] == column for place in self.cells))
        return replace(self, rows=rows, columns=columns)

    @property
    def is_whole(self) -> bool:
        return all(len(self.cells.get(place, ())) == number for place, number in self.planned.items())


@dataclass(frozen=True)
class _Job:
    cell: str
    line: list[str]
    values: dict[str, str]


def grid(composer: Composer, line: Sequence[str], output: Path, merging: str = "feddle") -> Grid:
    """The runs of a sweep that are finished, whichever sweep they were run for.

    Args:
        line: as typed after ``-m``.
        output: the output folder.
        merging: what ``baseline=none`` stands for.
    """
    cache = DataCache()
    jobs = [
        _Job(cell, job, dict(_split(text) for text in job))
        for cell, found in composer.cells(line).items()
        for job in found
    ]
    constant = {key for key in jobs[0].values if len({job.values.get(key) for job in jobs}) == 1}
    by_method = any(
        len({_method(job, merging) for job in jobs if job.cell == cell}) > 1 for cell in {j.cell for j in jobs}
    )
    found: dict[tuple[str, str], list[Run]] = {}
    planned: dict[tuple[str, str], int] = {}
    for job in jobs:
        entry = checked(composer.compose([*job.line, f"output_dir='{output}'"]), cache)
        if entry.status == "skipped":
            continue
        place = (_method(job, merging), job.cell) if by_method else (job.cell, _swept(job, jobs, constant))
        planned[place] = planned.get(place, 0) + 1
        if folder := finished_attempt(output, entry.digest):
            found.setdefault(place, []).append(read_run(folder))
    rows, columns = (tuple(dict.fromkeys(names)) for names in zip(*planned, strict=True))
    cells = {place: one_a_seed(runs) for place, runs in found.items()}
    return Grid("method" if by_method else "variant", rows, columns, cells, planned)


def _split(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key, value


def _method(job: _Job, merging: str) -> str:
    chosen = job.values.get("baseline", "none")
    return job.values.get("merging", merging) if chosen == "none" else chosen


def _swept(job: _Job, jobs: Sequence[_Job], constant: set[str]) -> str:
    """Values of the keys that differ within a cell, such as ``atlas.size=20``."""
    same = [other for other in jobs if other.cell == job.cell]
    keys = [
        key
        for key in job.values
        if key not in constant and key != "seed" and key not in METHOD and len({o.values.get(key) for o in same}) > 1
    ]
    heads = {f"{group}." for group in METHOD}
    return ", ".join(f"{_bare(key, heads)}={job.values[key]}" for key in keys) or "accuracy"


def _bare(key: str, heads: set[str]) -> str:
    """An option of the method without the group that it was chosen from."""
    return next((key.removeprefix(head) for head in heads if key.startswith(head)), key)
