"""The parts of a benchmark: rounds in turn, whole runs, ways to convolve, and cold starts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmark.contenders import Contender
from benchmark.processes import Child
from benchmark.progress import Tell
from benchmark.record import Record
from benchmark.workloads import Workload


def measure_rounds(
    workload: Workload, contenders: Sequence[Contender], repeats: int, folder: Path, record: Record, tell: Tell
) -> None:
    """All contenders' rounds in turn; the first of each is not counted."""
    tell("rounds, first one of each contender")
    rounds, given = 1 + repeats * workload.together, folder / f"{workload.name}.npz"
    line = workload.line(rounds)
    prepare = Child(1, do="given", line=line, rounds=rounds, file=str(given))
    prepare.answer()
    prepare.close()
    children = {}
    for one in contenders:
        children[one] = Child(
            1 if one.processes else one.threads,
            do="serve",
            contender=one.label,
            kind=one.kind,
            line=[*line, *one.overrides] if one.overrides else None,
            threads=one.threads,
            file=str(given),
            workload=asdict(workload),
        )
    for process in children.values():
        process.answer()
    for process in children.values():
        process.asked("round")
    for repeat in range(repeats):
        tell(f"rounds, repeat {repeat + 1} of {repeats}")
        # Whoever comes after a slow one finds the caches as that one left them; so the order turns.
        turn = repeat % len(contenders)
        for one in [*contenders[turn:], *contenders[:turn]]:
            seconds = sum(children[one].asked("round")["seconds"] for _ in range(workload.together))
            record.add("rounds", workload.name, one, repeat, "round", seconds / workload.together, "s")
    for one, process in children.items():
        record.add("rounds", workload.name, one, 0, "peak", process.asked("memory")["peak"], "MiB")
        process.close()


def measure_overhead(workload: Workload, one: Contender, rounds: int, folder: Path, record: Record) -> None:
    """A whole ``hybridfl train``: what of its rounds is neither local work nor the method's arithmetic."""
    line = [*workload.line(rounds), *one.overrides, f"evaluate_every={rounds}"]
    line.append(f"output_dir={folder / f'{workload.name} {one.label}'.replace(' ', '_')}")
    process = Child(1 if one.processes else one.threads, do="run", line=line, first_only=False)
    found = process.answer()
    process.close()
    for repeat, seen in enumerate(found["rounds"]):
        share = 1 - (seen["local"] + seen["method"]) / seen["round"]
        record.add("overhead", workload.name, one, repeat, "overhead", share, "share")
        for quantity in ("store", "local", "method"):
            record.add("overhead", workload.name, one, repeat, quantity, seen[quantity], "s")
    record.add("overhead", workload.name, one, 0, "peak of a run", found["peak"], "MiB")


def measure_convolutions(workload: Workload, threads: int, repeats: int, record: Record, tell: Tell) -> None:
    """Ways to convolve for all clients of a round at once, in turn, in one process."""
    tell(f"convolutions with {threads} threads")
    process = Child(threads, do="convolutions", threads=threads, workload=asdict(workload))
    process.answer()
    for repeat in range(repeats):
        for way, seconds in process.asked("step").items():
            record.add("convolutions", workload.name, Contender(way, threads), repeat, "step", seconds, "s")
    process.close()


def measure_startup(workload: Workload, repeats: int, folder: Path, record: Record, tell: Tell) -> None:
    """Cold processes: imports alone, ``--help``, and from the start of a run to its first round."""
    alone, program = Contender("torch and hydra alone", 1), Contender("hybridfl", 1)
    line = [*workload.line(1), f"output_dir={folder / 'startup'}"]
    commands = {
        "imports": (alone, [sys.executable, "-c", "import torch, hydra"]),
        "help": (program, [sys.executable, "-m", "hybridfl", "--help"]),
    }
    for repeat in range(repeats):
        tell(f"start-up, repeat {repeat + 1} of {repeats}")
        for quantity, (one, command) in commands.items():
            began = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            record.add("startup", workload.name, one, repeat, quantity, time.monotonic() - began, "s")
        spawned = time.monotonic()
        process = Child(1, do="run", line=line, first_only=True)
        found = process.answer()
        process.close()
        first = found["first"] - spawned
        record.add("startup", workload.name, program, repeat, "first round", first, "s")
        record.add("startup", workload.name, program, repeat, "loading", found["loading"], "s")
        record.add("startup", workload.name, program, repeat, "first round - loading", first - found["loading"], "s")
