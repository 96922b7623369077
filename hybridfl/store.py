"""A run's folder on disk: who holds it, how far it got, and writes that survive a kill at any instant.

outputs/runs/<digest>/      the first attempt; <digest>-2, <digest>-3, … are reruns beside it
    .lock                   held by the one process that works here; the system frees it when that process dies
    status.json             running, done, failed or interrupted, and how far
    log.txt                 what happened, with UTC times
    checkpoints/            hybridfl/checkpoints.py
    metrics.csv, …          hybridfl/tables.py
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hybridfl.errors import ConfigError, HybridflError

POLL_SECONDS = 0.2  # how often a waiting process looks whether the folder is free


class StoreError(HybridflError):
    """A file of a run cannot be read or written; the message names it and the reason."""


@contextmanager
def readable_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Turns an OSError (disk full, no permission, …) inside the block into a StoreError about ``path``."""
    try:
        yield
    except OSError as error:
        kept = " Everything written before is kept." if action == "write" else ""
        raise StoreError(f"Cannot {action} {path}: {error.strerror or error}.{kept}") from error


# -- files ------------------------------------------------------------------------------------------------------------


def write_bytes_atomic(path: Path, data: bytes | memoryview) -> None:
    """Writes the whole file or nothing: a reader, or a kill, sees the old content or the new, never a mixture.

    Raises:
        StoreError: the file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with readable_errors(path):
        try:
            with open(temporary, "wb", buffering=0) as file:
                write_all(file.fileno(), data)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Same as `write_bytes_atomic`, for text, in UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """One write call, repeated only for what the system did not take (files over 2 GiB, a disk about to be full)."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def remove_leftovers(folder: Path) -> None:
    """Removes half-written files of writers that were killed; call it only while holding the run."""
    with suppress(OSError):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable. Some systems cannot sync a folder; the file itself is safe there too."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- status and log ---------------------------------------------------------------------------------------------------


def read_status(folder: Path) -> dict[str, Any] | None:
    """The fields of ``status.json``; None if it is missing or torn.

    Raises:
        StoreError: it is there but cannot be read.
    """
    path = folder / "status.json"
    with readable_errors(path, "read"):
        try:
            fields = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
    return fields if isinstance(fields, dict) else None


def write_status(folder: Path, **fields: object) -> None:
    """Replaces ``status.json`` by exactly these fields.

    Raises:
        StoreError: it cannot be written; the old one is untouched.
    """
    write_text_atomic(folder / "status.json", json.dumps(fields, indent=2) + "\n")


def log(folder: Path, line: str) -> None:
    """Appends to ``log.txt`` with the time in UTC; further lines of a long message are indented.

    Raises:
        StoreError: it cannot be written.
    """
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = f"{stamp} " + line.rstrip("\n").replace("\n", "\n    ") + "\n"
    path = folder / "log.txt"
    with readable_errors(path), open(path, "ab", buffering=0) as file:
        write_all(file.fileno(), text.encode("utf-8", "backslashreplace"))


# -- run folders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """One attempt at a run, held by this process."""

    path: Path

    @property
    def done(self) -> bool:
        return is_done(self.path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def is_done(folder: Path) -> bool:
    """Whether the attempt in this folder was finished."""
    return (read_status(folder) or {}).get("status") == "done"


def is_held(folder: Path) -> bool:
    """Whether a process works in this folder now."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def finished_attempt(output_dir: Path, digest: str) -> Path | None:
    """The folder of the run ``digest`` that :func:`claim` would find done, without holding it; None if there is none."""
    first = Path(output_dir) / "runs" / digest
    if not first.is_dir():
        return None
    path = _pick(first.parent, digest, rerun=False)
    return path if is_done(path) else None


def is_busy(output_dir: Path, digest: str, rerun: bool) -> bool:
    """Whether another process works in the folder that :func:`claim` would hold."""
    runs = Path(output_dir) / "runs"
    return runs.is_dir() and is_held(_pick(runs, digest, rerun))


@contextmanager
def claim(output_dir: Path, digest: str, rerun: bool, on_wait: Callable[[str], None]) -> Iterator[RunFolder]:
    """Holds the folder of the run ``digest``, alone, for the length of the block.

    Without ``rerun``: the newest attempt that is done, else the newest unfinished one, else a new one.
    With it: the newest attempt if it is an unfinished rerun (numbered 2 or more), else a new attempt beside the others.
    If another process holds the folder, waits for it, after one call of ``on_wait`` with a message. Ask ``done`` inside
    the block, not before: the other process may have finished the run meanwhile.

    Raises:
        ConfigError: under ``output_dir``: a file is in the way, or one may not write there.
        StoreError: the folder cannot be made, read or locked for another reason.
    """
    path = _make(Path(output_dir) / "runs", digest, rerun)
    lock = FileLock(path / ".lock")
    try:
        if _acquire(lock, path, on_wait):
            remove_leftovers(path)
        yield RunFolder(path)
    finally:
        lock.release()


def make_folder(folder: Path, key: str = "output_dir") -> None:
    """Makes the folder that a user named, or one below it, and all above it.

    Raises:
        ConfigError: under ``key``: a file is in the way, or one may not write there.
        StoreError: it cannot be made for another reason, such as a full disk.
    """
    with readable_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in MISPLACED:
                raise
            problem = f"cannot write to '{folder}' ({error.strerror}); name a folder that can be written to."
            raise ConfigError(key, problem) from error


MISPLACED = (errno.EACCES, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS)
"""Why a folder cannot be made where the user wants it; any other reason is not theirs."""


def _make(runs: Path, digest: str, rerun: bool) -> Path:
    make_folder(runs)
    while True:
        path = _pick(runs, digest, rerun)
        with readable_errors(path):
            if path.is_dir():
                return path
            try:
                path.mkdir()
                return path
            except FileExistsError:  # made by another process since we looked: pick again
                if not path.is_dir():
                    raise


def _pick(runs: Path, digest: str, rerun: bool) -> Path:
    attempts = _attempts(runs, digest)
    newest = max(attempts, default=0)
    if newest == 0:
        return runs / digest
    if rerun:
        unfinished_rerun = newest > 1 and not is_done(attempts[newest])
        return attempts[newest] if unfinished_rerun else runs / f"{digest}-{newest + 1}"
    done = [number for number, path in attempts.items() if is_done(path)]
    return attempts[max(done, default=newest)]


def _attempts(runs: Path, digest: str) -> dict[int, Path]:
    """The attempts there are, by number; the folder without a number is the first."""
    pattern = re.compile(re.escape(digest) + r"(?:-([2-9]|[1-9][0-9]+))?")
    with readable_errors(runs, "read"):
        found = [(pattern.fullmatch(path.name), path) for path in runs.iterdir() if path.is_dir()]
    return {int(match[1] or 1): path for match, path in found if match}


def _acquire(lock: FileLock, path: Path, on_wait: Callable[[str], None]) -> bool:
    """Takes the lock, waiting if need be; False if there is none to take: a finished run on a read-only disk."""
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError too, hence the order
            on_wait(f"Another process works on {path}: waiting until it is finished or stopped.")
            lock.acquire(timeout=-1, poll_interval=POLL_SECONDS)
    except OSError as error:
        if is_done(path):
            return False
        raise StoreError(f"Cannot lock {path}: {error.strerror or error}.") from error
    return True
