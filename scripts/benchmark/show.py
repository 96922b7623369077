"""Tables and a plot of what was measured."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmark.convolutions import ALONE
from benchmark.record import Record
from benchmark.references import REFERENCES
from benchmark.targets import ratio, targets

LIMITS = ("channels_last", "by_hand")


def limit_of(record: Record, workload: str, label: str) -> str | None:
    """The limit with as many threads; worker processes and nets without such a limit have that with one."""
    threads = label.rpartition(" ")[2]
    there = record.labels(workload, "round")
    wanted = [f"{kind} {count}" for kind in LIMITS for count in (threads, "1")]
    return next((name for name in wanted if name in there), None)


def show(record: Record, workloads: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)

    def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        shown = Table(title=title, title_justify="left")
        for column in columns:
            shown.add_column(column, justify="left" if column in ("what", "contender", "workload", "way") else "right")
        for row in rows:
            shown.add_row(*row)
        if shown.row_count:
            console.print(shown)

    for name in workloads:
        columns = ("contender", "median", "quartiles", "to the limit [95 %]", "peak MiB")
        table(f"{name}: seconds a round; contenders with their threads", columns, timed(record, name))
        ways_columns = ("way", "median", "quartiles", "to one after the other [95 %]")
        table(
            f"{name}: seconds of a step of all clients; ways to convolve with their threads",
            ways_columns,
            ways(record, name),
        )
    of_rounds = ("workload", "contender", "local ms", "method ms", "store ms", "outside", "peak MiB")
    table("Of a round in a whole run, medians", of_rounds, overheads(record, workloads))
    table("Start-up, seconds", ("what", "median", "least", "most"), startups(record, workloads))
    met = [(t.text, str(t.found), f"{t.limit:.3g}", "yes" if t.met else "no") for t in targets(record)]
    table("Targets", ("what", "found [95 %]", "at most", "met"), met)


def timed(record: Record, workload: str) -> Iterator[tuple[str, ...]]:
    for label in record.labels(workload, "round"):
        seconds = record.values(workload, label, "round")
        low, high = np.quantile(seconds, [0.25, 0.75])
        limit = limit_of(record, workload, label)
        to_limit = str(ratio(seconds, record.values(workload, limit, "round"))) if limit else ""
        peak = told(record.values(workload, label, "peak"))
        yield label, f"{np.median(seconds):.4f}", f"{low:.4f} {high:.4f}", to_limit, peak


def ways(record: Record, workload: str) -> Iterator[tuple[str, ...]]:
    for label in record.labels(workload, "step"):
        seconds = record.values(workload, label, "step")
        low, high = np.quantile(seconds, [0.25, 0.75])
        alone = record.values(workload, f"{ALONE} {label.rpartition(' ')[2]}", "step")
        compared = str(ratio(seconds, alone)) if alone else ""
        yield label, f"{np.median(seconds):.4f}", f"{low:.4f} {high:.4f}", compared


def overheads(record: Record, workloads: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for workload in workloads:
        for label in record.labels(workload, "method"):  # the last to be written
            parts = [1e3 * statistics.median(record.values(workload, label, q)) for q in ("local", "method", "store")]
            outside = 100 * statistics.median(record.values(workload, label, "overhead"))
            peak = told(record.values(workload, label, "peak of a run"))
            yield workload, label, *(f"{part:.2f}" for part in parts), f"{outside:.1f} %", peak


def told(peaks: Sequence[float]) -> str:
    """Nothing, where a run was stopped before."""
    return "".join(f"{peak:.0f}" for peak in peaks)


def startups(record: Record, workloads: Sequence[str]) -> Iterator[tuple[str, ...]]:
    rows = (("torch and hydra alone", "imports"), *(("hybridfl", q) for q in ("help", "first round", "loading")))
    for workload in workloads:
        for who, quantity in rows:
            if seconds := record.values(workload, f"{who} 1", quantity):
                told = (statistics.median(seconds), min(seconds), max(seconds))
                yield f"{who}: {quantity}", *(f"{value:.3f}" for value in told)


def draw(record: Record, workloads: Sequence[str], file: Path) -> None:
    """Every repeat as a dot, medians as lines."""
    from matplotlib.figure import Figure

    shown = [workload for workload in workloads if record.labels(workload, "round")]
    if not shown:
        return
    height = 1 + sum(0.7 + 0.28 * len(record.labels(workload, "round")) for workload in shown)
    figure = Figure(figsize=(8, height), layout="constrained")
    heights = [len(record.labels(workload, "round")) + 2 for workload in shown]
    for axes, workload in zip(
        figure.subplots(len(shown), height_ratios=heights, squeeze=False)[:, 0], shown, strict=True
    ):
        labels = record.labels(workload, "round")
        for place, label in enumerate(labels):
            seconds = record.values(workload, label, "round")
            colour = "tab:grey" if label.rpartition(" ")[0] in REFERENCES else "tab:blue"
            axes.plot(seconds, [place] * len(seconds), "o", color=colour, alpha=0.4, markersize=4)
            axes.plot(statistics.median(seconds), place, "|", color=colour, markersize=14)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_title(workload, loc="left")
    axes.set_xlabel("seconds a round")
    figure.savefig(file, dpi=150)
