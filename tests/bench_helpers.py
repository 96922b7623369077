"""Tiny workloads of the benchmark."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

from benchmark.contenders import Hybridfl, write_given  # noqa: E402
from benchmark.references import Given  # noqa: E402
from benchmark.workloads import WORKLOADS, Workload  # noqa: E402

TINY = {name: replace(workload.small(), train=480) for name, workload in WORKLOADS.items()}


def given(workload: Workload, folder: Path) -> tuple[Hybridfl, Given]:
    ours = Hybridfl(workload.line(3))
    write_given(ours, 3, folder / "given.npz")
    return ours, Given.read(folder / "given.npz", workload)
