"""What is known of single participants: coefficients over the rounds, and the accuracy of every client at the end."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hybridfl.keys import label
from hybridfl.report.rows import Shown, place_of, rounded, thinned
from hybridfl.report.splits import Splits
from hybridfl.runs import Run, number
from hybridfl.statistics import mean_sd

ROUNDS = 120
"""Of a run's coefficients, at most."""
VALUES = 60_000
"""Coefficients, and accuracies of clients, in the page; further runs are left out."""
NAME = "coefficient"
HONEST = "honest"
SCOPE = "clients"
SERVER = -1
"""As in :mod:`hybridfl.types`, which imports torch."""


def _in_turn(of: Shown) -> Iterator[tuple[int, Run]]:
    """Rows with their runs, every row's first seed before any row's second: so that each row has one if not all fit."""
    for runs in zip_longest(*(row.all_runs for row in of.rows)):
        yield from ((place, run) for place, run in enumerate(runs) if run is not None)


def coefficients(of: Shown, splits: Splits) -> list[dict[str, Any]]:
    """Of each run that reports them: by round and participant, and their means by role."""
    found, values, left_out, places = [], 0, 0, place_of(of)
    for row, run in _in_turn(of):
        reported = _reported(run.folder / "method.csv")
        if not reported:
            continue
        every = sorted({round for round, _ in reported})
        rounds = [every[i] for i in thinned(len(every), ROUNDS)]
        roles = splits.roles(run)
        kept = {key: value for key, value in reported.items() if key[0] in set(rounds)}
        if values + len(kept) > VALUES:
            left_out += 1
            continue
        values += len(kept)
        found.append(
            {
                "row": row,
                "run": places[str(run.folder)],
                "seed": label(run.value("seed")),
                "rounds": rounds,
                "roles": dict(roles),
                "values": [[round, who, rounded(value, 3)] for (round, who), value in kept.items()],
                "means": _by_role(kept, rounds, {int(client): role for client, role in roles.items()}),
            }
        )
    if left_out:
        of.warn(f"Coefficients of {left_out} runs are left out, to keep the page small.")
    return sorted(found, key=lambda one: (one["row"], one["run"]))


def _reported(file: Path) -> dict[tuple[int, int], float]:
    """(Round, participant) → coefficient."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return {}
    if f",{NAME}," not in text:
        return {}
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["name"] == NAME and row["participant"]]
    found = {(int(row["round"]), int(row["participant"])): number(row["value"]) for row in rows}
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _by_role(
    values: dict[tuple[int, int], float], rounds: list[int], roles: dict[int, str]
) -> dict[str, list[float | int | None]]:
    """Role → the mean of its participants in each round; the server is a role of its own."""
    groups: dict[str, dict[int, list[float]]] = {}
    for (round, who), value in values.items():
        role = "server" if who == SERVER else roles.get(who, HONEST)
        groups.setdefault(role, {}).setdefault(round, []).append(value)
    return {
        role: [rounded(mean_sd(by_round.get(round, []))[0], 3) for round in rounds] for role, by_round in groups.items()
    }


def clients(of: Shown, splits: Splits) -> dict[str, Any]:
    """Every client's accuracy in the last evaluation on its own test set, by run; empty if no run has them.

    Beside them stand the means of each row over clients, over the worst tenth of them, and over seeds.
    """
    found, values, left_out, places = [], 0, 0, place_of(of)
    for row, run in _in_turn(of):
        accuracies = _last(run.folder / "clients.csv")
        if not accuracies:
            continue
        if values + len(accuracies) > VALUES:
            left_out += 1
            continue
        values += len(accuracies)
        roles = splits.roles(run)
        found.append(
            {
                "row": row,
                "run": places[str(run.folder)],
                "seed": label(run.value("seed")),
                "roles": {client: role for client, role in roles.items() if int(client) in accuracies},
                "clients": list(accuracies),
                "accuracy": [rounded(value, 4) for value in accuracies.values()],
            }
        )
    if left_out:
        of.warn(f"Accuracies of the clients of {left_out} runs are left out, to keep the page small.")
    if not found:
        return {}
    means = {}
    if any(SCOPE in run.curves for run in of.runs):
        for metric in ("accuracy", "worst10"):
            table = of.view(replace(of.table.options, scope=SCOPE, metric=metric, at="last"))
            means[metric] = [rounded(row.summaries[()].mean) for row in table.rows]
    return {"runs": sorted(found, key=lambda one: (one["row"], one["run"])), "means": means}


def _last(file: Path) -> dict[int, float]:
    """Client → accuracy in the last evaluation of ``clients.csv``; empty without one."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    if len(lines) < 2:
        return {}
    last = lines[-1].partition(",")[0] + ","
    rows = csv.DictReader([lines[0], *(line for line in lines[1:] if line.startswith(last))])
    found = {int(row["client"]): number(row["accuracy"]) for row in rows}
    return {client: value for client, value in found.items() if math.isfinite(value)}
