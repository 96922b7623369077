"""The rows that all sections share: a method in a setting, with its runs, named as briefly as can be told apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridfl.keys import label, token
from hybridfl.runs import ABSENT, Run
from hybridfl.tabulate import DAGGER, Options, Row, Table, moves_raw_data, tabulate


@dataclass(frozen=True)
class Shown:
    """What the sections are made of.

    Attributes:
        runs: all of them; a run is named by its place.
        table: of ``hybridfl compare`` with its defaults.
        warn: takes what a section leaves out.
    """

    runs: Sequence[Run]
    table: Table
    warn: Callable[[str], None]

    @property
    def rows(self) -> list[Row]:
        return self.table.rows

    def view(self, options: Options) -> Table:
        """The same rows with other numbers; the same warnings about rows are not repeated."""
        return tabulate(self.runs, options, lambda text: None)


def place_of(shown: Shown) -> dict[str, int]:
    """Run folder → its place among all runs."""
    return {str(run.folder): place for place, run in enumerate(shown.runs)}


def described(shown: Shown) -> list[dict[str, Any]]:
    """Every row: method and setting as text, the seeds and places of its runs, whether raw data are moved."""
    keys, places = shown.table.keys, place_of(shown)
    short = short_names(keys)
    texts: dict[tuple[str, str], str] = {}  # 0 and 0.0 are one setting, as for the rows
    found = []
    for row in shown.rows:
        values = dict(zip(keys, row.values, strict=True))
        method = label(values.pop("method", row.all_runs[0].value("method")))
        parts = {
            key: f"{short[key]}={texts.setdefault((key, token(value)), label(value))}"
            for key, value in values.items()
            if value is not ABSENT
        }
        own = [text for key, text in parts.items() if key.startswith("method.")]
        raw = moves_raw_data(row.all_runs)
        found.append(
            {
                "method": " ".join([method, *own]) + (DAGGER if raw else ""),
                "setting": " ".join(text for key, text in parts.items() if not key.startswith("method.")),
                "seeds": [label(run.value("seed")) for run in row.all_runs],
                "runs": [places[str(run.folder)] for run in row.all_runs],
                "raw": raw,
            }
        )
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Keys by their last part, where that tells them apart."""
    last = [_last(key) for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _last(key: str) -> str:
    parts = key.split(".")
    return parts[-2] if parts[-1] in ("name", "_target_") and len(parts) > 1 else parts[-1]


def rounded(value: float, digits: int = 5) -> float | int | None:
    """A number as short as a picture needs it; None where it is not defined."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() else short


def thinned(count: int, most: int) -> list[int]:
    """Up to ``most`` of the places 0 … count - 1, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
