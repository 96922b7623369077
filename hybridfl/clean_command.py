"""``hybridfl clean``: frees disk of what finished runs no longer need."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from hybridfl.errors import ConfigError
from hybridfl.progress import megabytes
from hybridfl.run_files import run_folders, size_of
from hybridfl.store import is_done, readable_errors

LISTED = 20
"""Runs that are named one by one."""
EPILOG = """\
Only checkpoints of finished runs are removed; they are shown, and nothing is asked. Tables, splits and configs stay, so that
compare, claims, show and train know the runs as before. `export` needs checkpoints: export first what is to be deployed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl clean``."""
    parser.epilog = EPILOG
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="runs, sweeps, output folders (default: outputs)"
    )
    parser.add_argument("--checkpoints", action="store_true", help="remove the checkpoints of finished runs")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be removed")


def run(args: argparse.Namespace) -> int:
    """Removes, prints what was removed, and returns the exit status."""
    if not args.checkpoints:
        raise ConfigError("clean", "say what is to be removed: --checkpoints.")
    freed, unfinished = clean(args.paths or [Path("outputs")], args.dry_run)
    word = "would be removed" if args.dry_run else "removed"
    for folder, size in list(freed.items())[:LISTED]:
        print(f"{folder}  {megabytes(size)}")
    if len(freed) > LISTED:
        print(f"and {len(freed) - LISTED} more")
    total = megabytes(sum(freed.values()))
    print(f"checkpoints of {len(freed)} finished runs {word}: {total}; {unfinished} unfinished runs untouched.")
    return 0


def clean(paths: list[Path], dry_run: bool) -> tuple[dict[Path, int], int]:
    """Bytes of checkpoints by the run folder that they were removed from, and how many runs are not finished.

    Raises:
        ConfigError: a path is no run, sweep or output folder.
        StoreError: something cannot be removed.
    """
    freed: dict[Path, int] = {}
    unfinished = 0
    for folder in run_folders(paths):
        checkpoints = folder / "checkpoints"
        if not is_done(folder):
            unfinished += 1
            continue
        if not checkpoints.is_dir():
            continue
        lock = FileLock(folder / ".lock")
        try:
            # A finished run is held only by one that just finds it so.
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            freed[folder] = size_of(checkpoints)
            if not dry_run:
                with readable_errors(checkpoints, "remove"):
                    shutil.rmtree(checkpoints)
        finally:
            lock.release()
    return freed, unfinished
