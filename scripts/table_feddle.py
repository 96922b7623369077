"""The study of Feddle: runs what is missing of the presets feddle_e1 to feddle_e10, then tables, plots and verdicts.

    python scripts/table_feddle.py                                    at the scale cpu, some eight core-hours
    python scripts/table_feddle.py --scale smoke --out outputs/smoke  to see that it works
    python scripts/table_feddle.py --no-runs                          tables of what has been run

What is finished is not run again, so that a study that was stopped goes on when it is started again. The page goes to
docs/results/feddle.md with its pictures beside it, the tables as LaTeX to OUTPUT_DIR/tables.
"""

from __future__ import annotations

import argparse
import platform
import sys

from results.arguments import study_parser
from results.page import section, sweep

from hybridfl.cli import main
from hybridfl.config import Composer, choices
from hybridfl.preset_sweeps import sweep_at
from hybridfl.store import write_text_atomic

PRESETS = sorted(
    (name for name in choices("experiment") if name.startswith("feddle_e")),
    key=lambda name: int(name[8:].split("_")[0]),
)


def line_of(name: str, chosen: argparse.Namespace) -> list[str]:
    return [f"experiment={name}", f"scale={chosen.scale}", *chosen.overrides]


def announce(chosen: argparse.Namespace) -> None:
    """What there is to be done and how long it takes, by what was measured; where nothing was, by the others' runs."""
    jobs, measured = {}, {}
    with Composer() as composer:
        for name in chosen.presets:
            jobs[name] = len(composer.expand(line_of(name, chosen)))
            sweep = sweep_at(composer.compose([f"experiment={name}", f"scale={chosen.scale}"]).config)
            if sweep and sweep.core_minutes:
                measured[name] = sweep.core_minutes
    each = sum(measured.values()) / sum(jobs[name] for name in measured) if measured else 0.0
    for name, number in jobs.items():
        told = f", {measured[name]:g} core-minutes" if name in measured else ""
        print(
            f"{name}: {number} jobs" + (told or (f", about {each * number:.0f} core-minutes" if each else "")),
            file=sys.stderr,
        )
    if each:
        total = sum(measured.get(name, each * number) for name, number in jobs.items())
        print(f"all of it: {total / 60:.1f} core-hours, less what is finished", file=sys.stderr)


def pretrain(name: str, chosen: argparse.Namespace) -> None:
    """The files that cells of the preset start from."""
    with Composer() as composer:
        found = sweep_at(composer.compose([f"experiment={name}", f"scale={chosen.scale}"]).config)
    for file, line in (found.pretrained if found else {}).items():
        out = chosen.output_dir / file
        out.parent.mkdir(parents=True, exist_ok=True)
        status = main(["pretrain", *line.split(), f"output_dir='{chosen.output_dir}'", "-o", str(out)])
        if status:
            sys.exit(status)


def study() -> int:
    parser = study_parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS, metavar="PRESET")
    chosen = parser.parse_intermixed_args()
    chosen.output_dir = chosen.output_dir.resolve()
    announce(chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)
    parts, whole = [], True
    for name in chosen.presets:
        line = line_of(name, chosen)
        if not chosen.no_runs:
            pretrain(name, chosen)
            sweep(line, chosen.output_dir, chosen.jobs)
        text, complete = section(name, line, chosen.output_dir, chosen.out, chosen.output_dir / "tables")
        parts.append(text)
        whole = whole and complete
        print(text, flush=True)
    write_text_atomic(chosen.out / "feddle.md", "\n".join([*introduction(chosen, whole), *parts]))
    return 0


def introduction(chosen: argparse.Namespace, whole: bool) -> list[str]:
    import torch

    command = f"make table-feddle SCALE={chosen.scale}"
    lines = [
        "# Feddle: the study",
        "",
        f"Produced by `{command}` (`scripts/table_feddle.py`), torch {torch.__version__}, {platform.machine()}.",
        "Every number is read from stored runs; nothing is copied by hand. What the numbers mean is said in",
        "[findings](feddle_findings.md). Methods with † move raw data.",
        "",
    ]
    return lines if whole else [*lines, "**Not all runs of this page are finished.**", ""]


if __name__ == "__main__":
    sys.exit(study())
