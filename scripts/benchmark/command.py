"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from benchmark.contenders import Contender, contender, references
from benchmark.machine import machine, warn
from benchmark.measure import measure_convolutions, measure_overhead, measure_rounds, measure_startup
from benchmark.processes import Child
from benchmark.progress import progress
from benchmark.record import Record
from benchmark.show import draw, show
from benchmark.stopping import Stopped, listen
from benchmark.workloads import CONV, FOR_CPUS, WORKLOADS, Workload

PARTS = ("rounds", "overhead", "convolutions", "startup")


def parsed(arguments: Sequence[str] | None, about: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(FOR_CPUS))
    parser.add_argument("--device", default="cpu", help="where all contenders work, such as cuda")
    parser.add_argument("--executors", nargs="+", help="of conf/executor; all of them without it")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="or worker processes")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rivals", nargs="+", default=[], metavar="MODULE.CLASS", help="see docs/performance.md")
    parser.add_argument("--quick", action="store_true", help="toy sizes: the numbers mean nothing")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/bench"))
    return parser.parse_args(arguments)


def study(chosen: argparse.Namespace) -> None:
    """Measure, and show what was measured, even if something stops it."""
    named = [WORKLOADS[name] for name in dict.fromkeys(chosen.workloads)]
    workloads, repeats = [replace(workload, device=chosen.device) for workload in named], chosen.repeats
    if chosen.quick:
        workloads, repeats = [workload.small() for workload in workloads], min(repeats, 3)
    about = machine() | {"load at the start": os.getloadavg(), "quick": chosen.quick, "repeats": repeats}
    warn(about)
    folder = chosen.output_dir / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    with (folder / "bench.csv").open("w", newline="", encoding="utf-8") as file:
        record = Record(file)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    measure(chosen, workloads, repeats, Path(scratch), record)
                finally:
                    Child.end_all()
        finally:
            about["load at the end"] = os.getloadavg()
            (folder / "machine.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            names = [workload.name for workload in workloads]
            draw(record, names, folder / "bench.png")
            show(record, names)
            print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
            warn(about)
            print(f"bench: {folder.resolve()}")


def measure(
    chosen: argparse.Namespace, workloads: Sequence[Workload], repeats: int, place: Path, record: Record
) -> None:
    """All parts, one workload after the other."""
    from hybridfl.config import choices

    there = list(choices("executor"))
    executors = chosen.executors or there
    if missing := sorted(set(executors) - set(there)):
        print(f"not there: {', '.join(missing)}; there are {', '.join(there)}", file=sys.stderr)
    ours = [contender(name, t) for name in executors if name in there for t in chosen.threads]
    rivals = [Contender(kind, 1) for kind in chosen.rivals]
    for workload in workloads:
        with progress(workload.name) as tell:
            if "rounds" in chosen.parts:
                everybody = [*ours, *references(workload, chosen.threads), *rivals]
                measure_rounds(workload, everybody, repeats, place, record, tell)
            for number, one in enumerate(ours if "overhead" in chosen.parts else []):
                tell(f"whole runs, {number + 1} of {len(ours)}")
                # Of a long round a few are enough; two of them, the first and the last, do not count.
                rounds = repeats + 2 if workload.net == "mlp" else min(repeats, 5) + 2
                measure_overhead(workload, one, rounds, place, record)
            if "convolutions" in chosen.parts and workload.net == CONV:
                for threads in chosen.threads:
                    measure_convolutions(workload, threads, repeats, record, tell)
    if "startup" in chosen.parts:
        started = next((workload for workload in workloads if workload.name == "W2"), workloads[0])
        with progress(started.name) as tell:
            measure_startup(started, 1 if chosen.quick else 5, place, record, tell)


def main(about: str | None = None) -> None:
    """Args:
    about: for ``--help``.
    """
    chosen = parsed(None, about)
    listen()
    try:
        study(chosen)
    except Stopped as stopped:
        print(f"bench: stopped by {stopped}", file=sys.stderr)
        sys.exit(stopped.status)
