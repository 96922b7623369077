"""Runs compared at equal cost: each is read where it stood when a budget was used up, as ``hybridfl compare --budget`` asks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hybridfl.errors import ConfigError, nearest
from hybridfl.keys import label
from hybridfl.runs import Curve, Run, to_stderr

OPTION = "--budget"
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
BYTES = PREFIXES | {f"{prefix}B": size for prefix, size in (PREFIXES | BINARY).items()}
SECONDS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
UNITS: Mapping[str, Mapping[str, float]] = {
    "bytes": BYTES,
    "macs": PREFIXES,
    "local_steps": PREFIXES,
    "rounds": PREFIXES,
    "seconds": SECONDS,
    "sim_seconds": SECONDS,
}
"""What a budget can be of, and the units it is written in; a MB is 10⁶ bytes, as in the tables."""
FORM = re.compile(r"(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-z]*)")
NAMED = 3
"""So many run folders of a method are named, if not all its runs are meant."""


@dataclass(frozen=True)
class Budget:
    """At most ``limit`` of ``cost``, as typed in ``text``."""

    text: str
    cost: str
    limit: float


def parse(text: str) -> Budget:
    """A budget as typed, such as ``bytes=10MB``, ``macs=1e12``, ``seconds=2min`` or ``rounds=30``.

    Raises:
        ConfigError: it has another form, or a cost or unit that there is not.
    """
    cost, sign, amount = (part.strip() for part in text.partition("="))
    if cost not in UNITS:
        raise ConfigError(OPTION, f"got '{text}': no cost '{cost}'. {nearest(cost, UNITS)}")
    found = FORM.fullmatch(amount)
    if not sign or found is None:
        raise ConfigError(
            OPTION, f"got '{text}': not an amount of {cost}; nearest valid form: {cost}={_example(cost)}."
        )
    number, unit = found.groups()
    if unit not in UNITS[cost]:
        near = next((known for known in UNITS[cost] if known.lower() == unit.lower()), None)
        hint = f"Did you mean '{number}{near}'? " if near else ""
        valid = ", ".join(filter(None, UNITS[cost]))
        raise ConfigError(OPTION, f"got '{text}': no unit '{unit}' of {cost}. {hint}Valid: {valid}, or none.")
    limit = float(number) * UNITS[cost][unit]
    if not 0 < limit < math.inf:
        raise ConfigError(OPTION, f"got '{text}': a budget is above 0; nearest valid form: {cost}={_example(cost)}.")
    return Budget(f"{cost}={number}{unit}", cost, limit)


def _example(cost: str) -> str:
    return {"bytes": "10MB", "seconds": "60", "sim_seconds": "60", "rounds": "30"}.get(cost, "1e12")


def cut(runs: Sequence[Run], given: Sequence[str], scope: str, warn: Callable[[str], None] = to_stderr) -> list[Run]:
    """The runs as if each had ended with its last evaluation within all budgets.

    Args:
        scope: whose evaluations are meant; those of any other where a run has none in it.
        warn: told which runs have no evaluation within the budgets, and which end before they are used up.

    Raises:
        ConfigError: a budget that is none, or one within which no run has an evaluation.
    """
    budgets = [parse(text) for text in given]
    if not budgets:
        return list(runs)
    kept, without, early = [], [], []
    for run in runs:
        curve = run.curves.get(scope) or max(run.curves.values(), key=lambda curve: curve.last_round, default=None)
        count = min((_within(budget, curve) for budget in budgets), default=0) if curve else 0
        if curve is None or not count:
            without.append(run)
            continue
        kept.append(run.until(curve.rounds[count - 1]))
        if count == len(curve.rounds):
            early.append(run)
    said = " ".join(budget.text for budget in budgets)
    if not kept:
        raise ConfigError(OPTION, f"got {said}: no run has an evaluation within it.{_least(budgets, runs, scope)}")
    if without:
        warn(f"No evaluation within {said}, left out: {_named(without, runs)}.")
    if early:
        warn(f"Read at their end, which is within {said}: {_named(early, runs)}.")
    return kept


def _within(budget: Budget, curve: Curve) -> int:
    """How many evaluations come before the first that costs more, or an unknown amount."""
    spent = curve.spent(budget.cost)
    return next((place for place, cost in enumerate(spent) if not cost <= budget.limit), len(spent))


def _least(budgets: Sequence[Budget], runs: Sequence[Run], scope: str) -> str:
    curves = [curve for run in runs if (curve := run.curves.get(scope))]
    firsts = {
        budget.cost: [first for curve in curves if math.isfinite(first := curve.spent(budget.cost)[0])]
        for budget in budgets
    }
    least = [f"{cost}={min(found):.15g}" for cost, found in firsts.items() if found]
    return f" The first evaluations are at {' and '.join(least)}." if least else " These runs have not counted it."


def _named(some: Sequence[Run], runs: Sequence[Run]) -> str:
    """Methods with how many of their runs, and the folders of a few of them."""
    by_method: dict[str, list[str]] = {}
    for run in some:
        by_method.setdefault(label(run.value("method")), []).append(run.folder.name)
    texts = []
    for method, names in by_method.items():
        total = sum(label(run.value("method")) == method for run in runs)
        few = ", ".join([*names[:NAMED], *(["…"] if len(names) > NAMED else [])])
        texts.append(f"{method} ({f'all {total}' if len(names) == total else f'{len(names)} of {total}: {few}'})")
    return "; ".join(texts)
