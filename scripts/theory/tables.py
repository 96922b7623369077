"""What the probes found, as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hybridfl.statistics import mean_sd, power_law, rank_correlation, rounds_ratio
from theory.levels import Levels, Row
from theory.measures import METHODS

Lines = Iterator[Sequence[str]]


def mean_of(rows: Iterable[Row], name: str) -> float:
    return mean_sd([row[name] for row in rows if row.get(name) is not None])[0]


def within(rows: Iterable[Row], rounds: int) -> tuple[list[Row], list[Row]]:
    """The first and the last quarter of the rounds."""
    quarter, kept = max(1, rounds // 4), list(rows)
    return [r for r in kept if r["round"] <= quarter], [r for r in kept if r["round"] > rounds - quarter]


def chosen(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def distinct(rows: Iterable[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def both(rows: list[Row], name: str, rounds: int) -> str:
    return " / ".join(f"{mean_of(part, name):.2f}" for part in within(rows, rounds))


def tell_span(rows: list[Row], levels: Levels) -> Lines:
    sizes = distinct(rows, "size")
    spans = (f"span, K = {size}" for size in sizes)
    yield "alpha", "mean early / late", *spans, f"span / mean, K = {sizes[1]}", f"merge made, K = {sizes[1]}"
    for alpha in distinct(rows, "alpha"):
        of = chosen(rows, alpha=alpha)
        cells = [both(chosen(of, size=size), "captured", levels.short) for size in sizes]
        middle = chosen(of, size=sizes[1])
        parts = within(middle, levels.short)
        ratio = " / ".join(f"{mean_of(part, 'captured') / mean_of(part, 'cos2_mean'):.1f}" for part in parts)
        merge = both(middle, "cos2_merge", levels.short)
        yield f"{alpha:g}", both(of, "cos2_mean", levels.short), *cells, ratio, merge
    at_random = (f"{mean_of(chosen(rows, size=size), 'captured_at_random'):.3f}" for size in sizes)
    yield "a random space of K", "", *at_random, "", ""


KINDS = {
    "best_arrivals": "best of the same arrivals",
    "best_atlas": "best of the atlas",
    "merge": "the merge made",
}
"""Merges whose variance is compared with the mean's."""


def tell_variances(rows: list[Row], levels: Levels) -> Lines:
    yield "setting", "of the mean / ‖g‖²", *(f"mean / {name}" for name in KINDS.values())
    for setting in distinct(rows, "setting"):
        # The atlas is not full before.
        of = [row for row in chosen(rows, setting=setting) if row["round"] > levels.rounds // 6]
        relative = statistics.median(row["variance_mean"] / row["gradient"] for row in of)
        yield setting, f"{relative:.2f}", *(f"{ratio_of(of, kind):.2f}" for kind in KINDS)


def ratio_of(rows: list[Row], kind: str) -> float:
    """Median over rounds of the mean's variance over another's."""
    found = ((row["variance_mean"], row[f"variance_{kind}"]) for row in rows)
    return statistics.median(mean / other if other > 0 else math.inf for mean, other in found)


def tell_rounds(rows: list[Row], levels: Levels) -> Lines:
    yield "varied", "level", "feddle", "fedbuff", "ratio"
    for factor, level in dict.fromkeys((row["factor"], row["level"]) for row in rows):
        of = chosen(rows, factor=factor, level=level)
        ours, theirs = ([row["rounds"] for row in chosen(of, method=method)] for method in METHODS)
        ratio, bound = rounds_ratio(ours, theirs, levels.rounds)
        shown = (", ".join("never" if n is None else str(n) for n in side) for side in (ours, theirs))
        yield factor, f"{level:g}", *shown, f"{bound}{ratio:.2f}"


def tell_excess(rows: list[Row], levels: Levels) -> Lines:
    numbers = distinct(rows, "examples")
    yield "prox", "K", *(f"n_s = {n}" for n in numbers), "possible gain"
    for prox in distinct(rows, "prox"):
        for size in distinct(rows, "anchors"):
            of = chosen(rows, prox=prox, anchors=size)
            cells = [chosen(of, examples=n) for n in numbers]
            shown = (f"{mean_of(cell, 'excess'):.4f} ({mean_of(cell, 'gain'):+.3f})" for cell in cells)
            yield f"{prox:g}", str(size), *shown, f"{mean_of(of, 'possible_gain'):.3f}"
        yield f"{prox:g}", "exponent of K / n_s", f"{exponent(chosen(rows, prox=prox)):.2f}", *([""] * len(numbers))


def excess_by_ratio(rows: list[Row]) -> list[tuple[float, float]]:
    """``(K / n_s, mean excess)`` of every pair of the two."""
    pairs = dict.fromkeys((row["anchors"], row["examples"]) for row in rows)
    return sorted((k / n, mean_of(chosen(rows, anchors=k, examples=n), "excess")) for k, n in pairs)


def exponent(rows: list[Row]) -> float:
    x, y = zip(*excess_by_ratio(rows), strict=True)
    return power_law(x, y)


def cells_of(rows: list[Row], levels: Levels) -> list[Row]:
    """ε over all rounds and the error of the last ones, by pair and objective, means over seeds."""
    found = []
    for pair, objective in dict.fromkeys((row["pair"], row["objective"]) for row in rows):
        of = chosen(rows, pair=pair, objective=objective)
        early, late = within(of, levels.short)
        cell = {"epsilon": mean_of(of, "epsilon"), "early": mean_of(early, "epsilon"), "late": mean_of(late, "epsilon")}
        cell |= {"error": 1 - mean_of(late, "accuracy"), "gradient": mean_of(late, "gradient")}
        found.append({"pair": pair, "objective": objective, **cell})
    return found


def tell_surrogates(rows: list[Row], levels: Levels) -> Lines:
    yield "server's data", "objective", "ε", "early / late", "final error", "late ‖g‖²"
    cells = cells_of(rows, levels)
    for cell in cells:
        shown = (f"{cell['epsilon']:.2f}", f"{cell['early']:.2f} / {cell['late']:.2f}", f"{100 * cell['error']:.1f} %")
        yield cell["pair"], cell["objective"], *shown, f"{cell['gradient']:.3g}"
    groups = {"all": cells, **{name: chosen(cells, objective=name) for name in distinct(cells, "objective")}}
    for name, of in groups.items():
        correlation = rank_correlation([cell["epsilon"] for cell in of], [cell["error"] for cell in of])
        yield "rank correlation, ε with error", name, f"{correlation:+.2f}", "", f"{len(of)} cells", ""


STALENESS = ((0, 0), (1, 2), (3, 5), (6, 10), (11, 10**9))


def tell_coefficients(rows: list[Row], levels: Levels) -> Lines:
    yield "run", "anchors", "arrived now", "older", "all"
    for setting in distinct(rows, "setting"):
        of = chosen(rows, setting=setting)
        groups = {name: chosen(of, noisy=noisy) for name, noisy in (("noisy", True), ("clean", False))}
        clean = groups["clean"]
        for low, high in STALENESS:
            name = f"clean, staleness {low}" + ("" if low == high else f" to {high}" if high < 10**9 else " or more")
            groups[name] = [row for row in clean if low <= row["staleness"] <= high]
        for name, group in groups.items():
            if group:
                parts = (chosen(group, fresh=True), chosen(group, fresh=False), group)
                yield (
                    setting,
                    name,
                    *(f"{mean_of(part, 'coefficient'):+.3f} ({len(part)})" if part else "" for part in parts),
                )
