"""The command line of the study."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from theory.levels import FULL, TOY, Row
from theory.probes import PROBES, Probe
from theory.traces import Lab


def counted(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"


def show(name: str, probe: Probe, rows: list[Row], lab: Lab) -> None:
    from rich.console import Console
    from rich.table import Table

    about = f"{name}: {probe.title}; {counted(lab.seeds)}"
    table = Table(
        title=about, title_justify="left", caption=f"expected: {probe.expected}", caption_justify="left", min_width=100
    )
    columns, *lines = probe.tell(rows, lab.levels)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def write(name: str, probe: Probe, rows: list[Row], lab: Lab, folder: Path) -> None:
    """Every number as ``T1.csv``, and ``T1.png``."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    probe.draw(rows, lab.levels, axes)
    figure.suptitle(f"{name}, {counted(lab.seeds)}. Expected: {probe.expected}", fontsize=8)
    figure.savefig(folder / f"{name}.png", dpi=150)


def parsed(arguments: Sequence[str] | None, about: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="of every run; without it 60, and 40 for T1 and T5")
    parser.add_argument("--quick", action="store_true", help="toy sizes: the numbers mean nothing")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/theory"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides of every run")
    return parser.parse_args(arguments)


def study(arguments: Sequence[str] | None = None, usage: str | None = None) -> Path:
    asked = parsed(arguments, usage)
    levels = TOY if asked.quick else FULL
    if asked.rounds:
        moments = tuple(n for n in levels.moments if n < asked.rounds) or (asked.rounds,)
        levels = replace(levels, rounds=asked.rounds, short=asked.rounds, moments=moments)
    seeds = range(asked.first_seed, asked.first_seed + (1 if asked.quick else asked.seeds))
    lab = Lab(levels, seeds, tuple(asked.set))
    folder: Path = asked.output_dir / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    about = {"seeds": list(seeds), "rounds": levels.rounds, "quick": asked.quick, "base": levels.base, "set": asked.set}
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for name in dict.fromkeys(asked.probes):
        rows = PROBES[name].measure(lab)
        write(name, PROBES[name], rows, lab, folder)
        show(name, PROBES[name], rows, lab)
    print(f"theory: {folder.resolve()}")
    return folder
