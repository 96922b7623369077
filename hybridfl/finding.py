"""Which runs are meant by paths, folder names and digests, as people type them after a command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hybridfl.errors import ConfigError, DataError, HybridflError, nearest
from hybridfl.runs import Run, is_run, read_run, to_stderr
from hybridfl.sweep_table import read_rows


def find_runs(paths: Sequence[Path], warn: Callable[[str], None] = to_stderr) -> list[Run]:
    """The finished runs under ``paths``, one attempt of each; those of sweeps know the place of their job.

    Raises:
        ConfigError: a path is no run, sweep or output folder.
        DataError: no run is finished, and one cannot be read; or a sweep's table cannot.
        HybridflError: no run is finished.
    """
    left_out: Counter[str] = Counter()
    found_in = [entry for path in paths for entry in _folders(path, left_out)]
    unreadable: DataError | None = None
    # a dict keeps the order and drops repetitions
    jobs = dict.fromkeys(folder for folder, in_sweep in found_in if in_sweep)
    attempts: dict[str, list[Run]] = {}
    known: dict[str, Any] = {}
    for place, folder in enumerate(jobs | dict.fromkeys(folder for folder, _ in found_in)):
        try:
            found = read_run(folder, place if place < len(jobs) else None, known)
        except DataError as problem:
            left_out["unreadable"] += 1
            unreadable = unreadable or problem
            continue
        attempts.setdefault(found.digest, []).append(found)
    counting = [newest(found) for found in attempts.values()]
    left_out.update(
        one.state if one.state in ("failed", "skipped") else "unfinished" for one in counting if not one.done
    )
    done = [one for one in counting if one.done]
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    if not done:
        if unreadable:
            raise unreadable
        where = ", ".join(f"'{path}'" for path in paths)
        raise HybridflError(f"No finished run in {where}" + (f": {reasons}." if reasons else "."))
    if left_out:
        warn(f"{left_out.total()} of {left_out.total() + len(done)} runs left out: {reasons}.")
    return done


def _folders(path: Path, left_out: Counter[str]) -> list[tuple[Path, bool]]:
    """The run folders a path stands for, and whether a sweep names them."""
    given, path = path, path.resolve()
    if is_run(path):
        return [(path, False)]
    if (path / "runs.csv").is_file():
        return [(folder, True) for folder in _jobs(path, left_out)]
    runs = path / "runs" if (path / "runs").is_dir() else path
    found = sorted(folder for folder in runs.iterdir() if is_run(folder)) if runs.is_dir() else []
    if found or runs != path:
        return [(folder, False) for folder in found]
    if not path.exists() and given.parent == Path() and Path("outputs/runs").is_dir():
        return [(find_run(given.name, Path("outputs")).folder, False)]
    raise ConfigError(str(given), f"{_expected(path)} {_neighbours(path)}".rstrip())


def _expected(path: Path) -> str:
    return ("is not a" if path.exists() else "does not exist; expected a") + (
        " run folder (with config.yaml), sweep folder (with runs.csv) or output folder (with runs/)."
    )


def _neighbours(path: Path) -> str:
    """The nearest folders that do exist, beside the path or below the output folder it seems to lie in."""
    parent = next((folder for folder in path.parents if folder.is_dir()), path)
    near = [folder for folder in parent.iterdir() if folder.is_dir() and folder.name[0] != "." and folder != path]
    below = [folder for place in ("runs", "sweeps") for folder in (parent / place, parent / "outputs" / place)]
    near += [folder for place in below if place.is_dir() for folder in place.iterdir() if folder.is_dir()]
    return nearest(path.name, [folder.name for folder in near])


def _jobs(sweep: Path, left_out: Counter[str]) -> list[Path]:
    """The run folders of a sweep in the order of its jobs, all attempts of each run."""
    rows = read_rows(sweep)
    runs = sweep.parent.parent / "runs"
    attempts: dict[str, list[Path]] = {}
    for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
        attempts.setdefault(folder.name.partition("-")[0], []).append(folder)
    found: list[Path] = []
    for row in rows:
        name = row.run.partition("-")[0]
        here = [folder for folder in attempts.get(name, []) if is_run(folder)]
        if not here:
            left_out[row.status if row.status in ("failed", "skipped") else "missing" if name else "unfinished"] += 1
        found += here
    return found


def find_run(name: str, output_dir: Path) -> Run:
    """The run meant by a path, a folder name, a digest or the beginning of one.

    Raises:
        ConfigError: nothing is called so, or several digests begin so.
    """
    path = Path(name)
    if is_run(path):
        return read_run(path.resolve() if path.name in ("", "..") else path)
    runs = output_dir / "runs"
    names = sorted(folder.name for folder in runs.iterdir() if is_run(folder)) if runs.is_dir() else []
    if "-" in name and name in names:
        return read_run(runs / name)
    found = [folder for folder in names if folder.startswith(name)] if name else []
    digests = sorted({folder.partition("-")[0] for folder in found})
    if name in digests:
        digests = [name]
    if len(digests) > 1:
        raise ConfigError(name, f"several runs in '{runs}' begin so: {', '.join(digests)}. Type more of the digest.")
    if not digests:
        if (path / "runs.csv").is_file() or (path / "runs").is_dir():
            kind = "a sweep" if (path / "runs.csv").is_file() else "an output folder"
            raise ConfigError(name, f"is {kind}, not a run; hybridfl compare {name} shows what is in it.")
        hint = nearest(path.name, names)
        raise ConfigError(name, f"no run folder, and no run in '{runs}' is called so. {hint}".rstrip())
    return newest(read_run(runs / folder) for folder in found if folder.partition("-")[0] == digests[0])


def newest(attempts: Iterable[Run]) -> Run:
    """The attempt that counts: the newest one that is done, else the newest."""
    return max(attempts, key=lambda run: (run.done, run.attempt))
