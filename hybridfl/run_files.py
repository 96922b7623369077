"""Run and sweep folders as files: which there are, how large they are, how far their runs got. Nothing of a config is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from hybridfl.errors import ConfigError, nearest
from hybridfl.store import is_held, read_status
from hybridfl.sweep_table import read_rows


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder and below; what cannot be looked at counts nothing."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += size_of(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    except OSError:
        pass
    return total


def attempts_in(runs: Path) -> dict[str, list[Path]]:
    """The folders of every run by its digest, the newest attempt last."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(runs.iterdir(), key=_attempt) if runs.is_dir() else []:
        if folder.is_dir():
            found.setdefault(folder.name.partition("-")[0], []).append(folder)
    return found


def _attempt(folder: Path) -> int:
    number = folder.name.partition("-")[2]
    return int(number) if number.isdecimal() else 1


def state_of(attempts: Iterable[Path]) -> str:
    """``done``, ``failed``, ``running``, ``stopped`` or ``missing``: that of the newest attempt unless one is done."""
    state = "missing"
    for folder in attempts:
        told = str((read_status(folder) or {}).get("status", "missing"))
        if told == "done":
            return told
        state = told
    if state == "running":
        return state if is_held(folder) else "stopped"
    return "stopped" if state == "interrupted" else state


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The folders of all runs, finished or not, that run, sweep and output folders stand for.

    Raises:
        ConfigError: a path is none of them.
        DataError: a sweep's table cannot be read.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if (path / "status.json").is_file():
            found[path] = None
        elif (path / "runs.csv").is_file():
            attempts = attempts_in(path.resolve().parent.parent / "runs")
            for row in read_rows(path):
                found |= dict.fromkeys(attempts.get(row.run.partition("-")[0], []))
        elif (path / "runs").is_dir():
            for folders in attempts_in(path / "runs").values():
                found |= dict.fromkeys(folders)
        else:
            raise ConfigError(str(path), f"is no run, sweep or output folder. {_beside(path)}".rstrip())
    return list(found)


def _beside(path: Path) -> str:
    parent = next((folder for folder in path.parents if folder.is_dir()), Path())
    return nearest(path.name, [entry.name for entry in parent.iterdir() if entry.is_dir() and entry.name[0] != "."])
