"""Which config keys tell the rows of a table apart, and how their values are compared and written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hybridfl.config import NOT_IDENTITY
from hybridfl.errors import ConfigError, nearest
from hybridfl.runs import ABSENT, Run

NOT_RESULTS = NOT_IDENTITY | {"seed", "overrides", "digest"}
"""Top-level config keys that may differ between runs of one cell: what is no part of a run's identity, the seed, and what
is written beside the config."""


def label(value: Any) -> str:
    """A config value as the user would type it."""
    if value is ABSENT:
        return "–"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def name_of(values: Iterable[Any]) -> str:
    """A row in a word or two: the values that it has."""
    return ", ".join(label(value) for value in values if value is not ABSENT)


def token(value: Any) -> str:
    """A value as something to compare by: 1 and 1.0 are the same setting, 1 and "1" are not."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(float(value))
    return "ABSENT" if value is ABSENT else repr(value)


def check_key(option: str, key: str, runs: Sequence[Run]) -> None:
    """Raises ConfigError with the nearest valid key if no run has ``key``."""
    if all(run.value(key) is ABSENT for run in runs):
        every = {key for run in runs for key in run.flat}
        groups = {key.rpartition(".")[0] for key in every if key.endswith((".name", "._target_"))}
        raise ConfigError(option, f"no run has the config key '{key}'. {nearest(key, every | groups)}")


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The config keys that decide results and differ between runs; those of the method within one method only.

    Names come before the settings they imply. Seeds of parts that merely follow the run's own seed are no difference.
    """
    seen: dict[str, dict[str, set[str]]] = {}  # key → method, or "" for keys outside of it → values
    for key in {key: None for run in runs for key in run.flat}:
        if key.partition(".")[0] in NOT_RESULTS or key == "method.name" or _follows_seed(key, runs):
            continue
        values = seen.setdefault(key, {})
        for run in runs:
            method = str(run.value("method")) if key.startswith("method.") else ""
            values.setdefault(method, set()).add(token(run.value(key)))
    keys = [key for key, values in seen.items() if any(len(found) > 1 for found in values.values())]
    keys.sort(key=lambda key: (not key.endswith(".name"), not key.endswith("._target_")))
    methods = ["method"] if len({token(run.value("method")) for run in runs}) > 1 else []
    return methods + [_short(key, runs) for key in keys]


def _short(key: str, runs: Sequence[Run]) -> str:
    """``partitioning`` for ``partitioning._target_``, where the class name alone tells the same runs apart."""
    group = key.removesuffix("._target_")
    if group in (key, "method") or any(f"{group}.name" in run.flat for run in runs):
        return key
    return group if _decided(key, [group], runs) else key


def _follows_seed(key: str, runs: Sequence[Run]) -> bool:
    return key.endswith("seed") and all(run.value(key) in (None, run.value("seed")) for run in runs)


def rows_of(runs: Sequence[Run], rows: Sequence[str], cols: Sequence[str], warn: Callable[[str], None]) -> list[str]:
    """The row keys: those asked for, and every other key in which the runs differ.

    A key is not added if it is a member of a group whose name is already in the table (``dataset.classes`` of
    ``dataset``), or if it belongs to the columns and would only tear the rows apart.
    """
    chosen, added, untold = list(rows), [], []
    for key in differing_keys(runs):
        shown = [*chosen, *cols]
        if key in shown or any(_implied(key, by, runs) for by in shown):
            continue
        if cols and _decided(key, shown, runs) and (_decided(key, cols, runs) or not _decided(key, chosen, runs)):
            untold.append(key)
            continue
        chosen.append(key)
        added.append(key)
    if added:
        warn(f"The runs differ in {', '.join(added)}: added to the rows.")
    if untold:
        warn(f"The runs of different columns differ in {', '.join(untold)} as well.")
    return chosen


def block_keys(runs: Sequence[Run], rows: Sequence[str]) -> list[str]:
    """The settings that differ, beside the rows and what belongs to them: those over which rows are compared."""
    found: list[str] = []
    for key in differing_keys(runs):
        own = key in rows or ("method" in rows and key.startswith("method."))
        if not own and not _decided(key, [*rows, *found], runs) and not any(_implied(key, by, runs) for by in rows):
            found.append(key)
    return found


def _implied(key: str, by: str, runs: Sequence[Run]) -> bool:
    """Whether ``key`` lies in the group that ``by`` names and follows from that name."""
    group = re.sub(r"\.(name|_target_)$", "", by)
    names = by != group or any(run.value(f"{by}.name") is not ABSENT or f"{by}._target_" in run.flat for run in runs)
    return names and key.startswith(f"{group}.") and _decided(key, [by], runs)


def _decided(key: str, by: Sequence[str], runs: Sequence[Run]) -> bool:
    """Whether runs that agree in all of ``by`` agree in ``key``."""
    first: dict[tuple[str, ...], str] = {}
    return all(
        first.setdefault(tuple(token(run.value(k)) for k in by), token(run.value(key))) == token(run.value(key))
        for run in runs
    )
