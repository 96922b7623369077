"""What the probes found, as plots."""

from __future__ import annotations

import statistics
from typing import Any

from theory.levels import Levels, Row
from theory.measures import METHODS
from theory.tables import KINDS, cells_of, chosen, distinct, excess_by_ratio, mean_of, ratio_of, within


def draw_span(rows: list[Row], levels: Levels, axes: Any) -> None:
    _, late = within(rows, levels.short)
    alphas = distinct(rows, "alpha")
    for size in distinct(rows, "size"):
        shares = [mean_of(chosen(late, alpha=alpha, size=size), "captured") for alpha in alphas]
        axes.plot(alphas, shares, "o-", label=f"span, K = {size}")
    axes.plot(alphas, [mean_of(chosen(late, alpha=a), "cos2_mean") for a in alphas], "ks--", label="mean update")
    axes.set(xscale="log", xlabel="Dirichlet alpha", ylabel="share of ‖g‖², last quarter", ylim=(0, 1))
    axes.legend(frameon=False)


def draw_variances(rows: list[Row], levels: Levels, axes: Any) -> None:
    settings = distinct(rows, "setting")
    full = [row for row in rows if row["round"] > levels.rounds // 6]
    for kind, name in KINDS.items():
        axes.plot([ratio_of(chosen(full, setting=setting), kind) for setting in settings], settings, "o", label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="variance of the mean / variance of …")
    axes.invert_yaxis()
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(KINDS), fontsize=8)


def draw_rounds(rows: list[Row], levels: Levels, axes: Any) -> None:
    settings = list(dict.fromkeys((row["factor"], row["level"]) for row in rows))
    for method in METHODS:
        means = []
        for factor, level in settings:
            reached = [row["rounds"] for row in chosen(rows, factor=factor, level=level, method=method)]
            means.append(statistics.fmean(levels.rounds if n is None else n for n in reached))
        axes.plot(range(len(settings)), means, "o", label=method)
    axes.set_xticks(range(len(settings)), [f"{factor} {level:g}" for factor, level in settings], rotation=30)
    axes.set(ylabel=f"rounds to {100 * levels.target:g} % ({levels.rounds}: never)", ylim=(0, None))
    axes.legend(frameon=False)


def draw_excess(rows: list[Row], levels: Levels, axes: Any) -> None:
    for prox in distinct(rows, "prox"):
        points = [(x, y) for x, y in excess_by_ratio(chosen(rows, prox=prox)) if y > 0]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=f"prox {prox:g}")
            middle, height = points[len(points) // 2]
            line = [height * (x / middle) ** 0.5 for x, _ in points]
            axes.plot([x for x, _ in points], line, color="0.7", label=None)
    axes.set(xscale="log", yscale="log", xlabel="K / n_s", ylabel="excess loss (grey: square root)")
    axes.legend(frameon=False)


def draw_surrogates(rows: list[Row], levels: Levels, axes: Any) -> None:
    cells = cells_of(rows, levels)
    for objective in distinct(cells, "objective"):
        of = chosen(cells, objective=objective)
        axes.plot([cell["epsilon"] for cell in of], [100 * cell["error"] for cell in of], "o", label=objective)
        for cell in of:
            axes.annotate(cell["pair"], (cell["epsilon"], 100 * cell["error"]), fontsize=6, alpha=0.7)
    axes.set(xlabel="ε = 1 - cos(P ∇f̃, P g)", ylabel="final error, %", ylim=(0, None))
    axes.legend(frameon=False)


def draw_coefficients(rows: list[Row], levels: Levels, axes: Any) -> None:
    colours = {False: "tab:blue", True: "tab:red"}
    for setting, line in zip(distinct(rows, "setting"), ("o-", "x:"), strict=True):
        for noisy, fresh in ((False, True), (False, False), (True, True), (True, False)):
            of = chosen(rows, setting=setting, noisy=noisy, fresh=fresh)
            stale = sorted({row["staleness"] for row in of if row["staleness"] <= 20})
            if stale:
                means = [mean_of(chosen(of, staleness=s), "coefficient") for s in stale]
                name = f"{setting}: {'noisy' if noisy else 'clean'}, {'arrived now' if fresh else 'older'}"
                axes.plot(stale, means, line, color=colours[noisy], alpha=1 if fresh else 0.5, markersize=3, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="staleness, rounds since the update began", ylabel="mean coefficient times m")
    axes.legend(frameon=False, fontsize=8)
