"""The tables of ``hybridfl compare`` for several metrics and scopes, and accuracies by domain or width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hybridfl.formats import as_sheet, shown
from hybridfl.report.rows import Shown, rounded
from hybridfl.runs import SHOWN
from hybridfl.statistics import Summary
from hybridfl.tabulate import AT, OF_STREAMS, Options, Table

ROWS = 4000
"""Rows in all tables together, beyond which only the first tables are made."""


def sheets(of: Shown) -> list[dict[str, Any]]:
    """A table for each of the views that the runs allow; the first is that of ``hybridfl compare`` without options."""
    most = max(2, ROWS // len(of.rows))
    views = list(_views(of))
    if len(views) > most:
        left = ", ".join(f"{options.metric} {options.scope}" for options in views[most:])
        of.warn(f"Tables left out, as there are {len(of.rows)} rows: {left}. hybridfl compare makes them.")
    tables = [of.table if options == of.table.options else of.view(options) for options in views[:most]]
    return [_sheet(table) for table in tables]


def _views(of: Shown) -> Iterator[Options]:
    default = of.table.options
    every = {scope: None for run in of.runs for scope in run.curves}
    known = dict.fromkeys((*SHOWN, *every))
    plain = [scope for scope in known if scope in every and "/" not in scope]
    for scope in dict.fromkeys([default.scope, *plain]):
        yield replace(default, scope=scope)
        if any(run.matrix(scope) for run in of.runs):
            yield from (replace(default, scope=scope, metric=metric, at="last") for metric in OF_STREAMS)
    for scope in plain:
        yield replace(default, scope=scope, metric="loss")
    if "clients" in every:
        yield replace(default, scope="clients", metric="worst10")
    for at in AT:
        if at != default.at and (at != "best" or "validation" in every):
            yield from (replace(default, scope=scope, at=at) for scope in plain if scope in SHOWN)
    for scope in every:
        if scope not in plain and "/task=" not in scope:
            yield replace(default, scope=scope)


def _sheet(table: Table) -> dict[str, Any]:
    options, sheet = table.options, as_sheet(table)
    return {
        "name": f"{options.metric}, {options.scope}, {AT[options.at]}",
        "header": sheet.header,
        "left": sheet.left,
        "body": sheet.body,
        "bold": sorted(sheet.bold),
        "caption": sheet.caption,
        "reference": table.reference,
        "spread": [[rounded(row.summaries[()].mean), rounded(row.summaries[()].sd)] for row in table.rows],
        "differences": [_difference(row.summaries[()]) for row in table.rows],
    }


def _difference(cell: Summary) -> list[float | int | None] | None:
    """Mean, low and high; None without a pair."""
    return [rounded(value) for value in (cell.difference, cell.low, cell.high)] if cell.pairs else None


def parts(of: Shown) -> list[dict[str, Any]]:
    """Accuracies in the parts of a scope, such as ``global/domain=sketch``: mean and deviation by row and part."""
    groups: dict[tuple[str, str], list[str]] = {}
    for scope in {scope: None for run in of.runs for scope in run.curves}:
        base, _, part = scope.partition("/")
        kind, equals, name = part.partition("=")
        if equals and kind != "task":
            groups.setdefault((base, kind), []).append(name)
    found = []
    for (base, kind), names in groups.items():
        cells = []
        for name in names:
            table = of.view(replace(of.table.options, scope=f"{base}/{kind}={name}"))
            cells.append([_mean(row.summaries[()]) for row in table.rows])
        found.append({"scope": base, "kind": kind, "names": names, "cells": list(zip(*cells, strict=True))})
    return found


def _mean(cell: Summary) -> list[Any]:
    sd = f" ± {shown(cell.sd, 'accuracy')}" if cell.sd == cell.sd else ""
    return [rounded(cell.mean), shown(cell.mean, "accuracy") + sd]
