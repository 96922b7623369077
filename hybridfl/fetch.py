"""Downloads the public originals of a data set to where its reader looks: whole and checked, or not at all."""

from __future__ import annotations

import gzip
import os
import secrets
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from lzma import LZMAError
from pathlib import Path

from hybridfl.data.dataset import readable
from hybridfl.data.downloads import Download, checksum
from hybridfl.errors import ConfigError, DataError, HybridflError

TIMEOUT = 30
"""Seconds without an answer or a further byte."""
CHUNK = 1 << 18
STALE = 24 * 3600
"""Seconds after which the folder of a killed download is removed."""
INSTEAD = "Try again later, or name another address with --mirror."

Report = Callable[[int, int | None], None]
"""Takes the bytes that have come and those that will come, ``None`` if that is not known."""


def missing(downloads: Sequence[Download], root: Path, force: bool = False) -> list[Download]:
    """Those whose files are not all below ``root``; files of another content count as missing if ``force`` is set.

    Raises:
        DataError: a file has another content and ``force`` is not set, or it cannot be read.
    """
    needed = []
    for download in downloads:
        right = [_is_right(root / place, known, force) for place, known in download.files.items()]
        if not all(right):
            needed.append(download)
    return needed


def fetch(download: Download, root: Path, mirror: str | None = None) -> None:
    """Downloads one original, checks it and puts it in its place, in exchange for what may be there.

    Until it has come and been checked, all is in a hidden folder beside its place, which is gone afterwards.

    Args:
        download: what to get.
        root: the data root; made if need be.
        mirror: another base address, where the file has the same name.

    Raises:
        ConfigError: ``root`` cannot be written to.
        HybridflError: the server cannot be reached, refuses, breaks off, or sends something else; or the disk is full.
    """
    url = download.url if mirror is None else f"{mirror.rstrip('/')}/{download.name}"
    place = root / download.target
    with _staging(place if download.unpack else place.parent) as staging:
        try:
            came = _retrieved(url, download.hash, staging)
            taken = _unpacked(came, url, download.unpack, staging) if download.unpack else {"": came}
            for member, file in taken.items():
                target = place / member
                target.parent.mkdir(parents=True, exist_ok=True)
                file.chmod(staging.stat().st_mode & 0o666)  # pooch's file is for its owner alone
                os.replace(file, target)
        except OSError as error:
            raise HybridflError(f"{place}: cannot be written ({error.strerror or error}).") from error


def _is_right(file: Path, known: str, force: bool) -> bool:
    if not os.path.exists(file):
        return False
    with readable(file, "Make it readable, or name another folder with --data-root."):
        right = _has_hash(file, known)
    if not right and not force:
        raise DataError(
            f"{file}: has another content than the public original. Move it away, or replace it with --force."
        )
    return right


def _has_hash(file: Path, known: str) -> bool:
    from pooch import file_hash

    algorithm, digits = checksum(known)
    return bool(file_hash(str(file), alg=algorithm) == digits)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder in ``folder``: on the same disk as its files, which thus take their places in one step."""
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".fetch-*"):
                if time.time() - left.stat().st_mtime > STALE:
                    shutil.rmtree(left, ignore_errors=True)
            staging = folder / f".fetch-{secrets.token_hex(4)}"
            staging.mkdir()
        except OSError as error:
            problem = f"cannot write to '{folder}' ({error.strerror or error}); name a folder that can be written to."
            raise ConfigError("--data-root", problem) from error
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        for path in made:
            with suppress(OSError):  # not empty: something has come
                path.rmdir()


def _retrieved(url: str, known: str, staging: Path) -> Path:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    with _shown(url) as report:
        try:
            transfer = partial(_transfer, report=report)
            return Path(pooch.retrieve(url, known, fname="download", path=staging, downloader=transfer))
        except ValueError as error:  # pooch has compared the checksums
            raise HybridflError(
                f"{url}: what came is not the original: its checksum is not {known}. Nothing is kept. The file was changed "
                f"there, or something on the way, such as a login page, answered instead. {INSTEAD}"
            ) from error


def _transfer(url: str, file: str, _: object, *, report: Report) -> None:
    """A downloader for pooch, whose own unpacks what a server declares as packed: not the bytes of the checksum."""
    import requests
    from urllib3.exceptions import HTTPError

    done: int | None = None
    try:
        # identity: as the file is, not packed on the way.
        plain = {"Accept-Encoding": "identity"}
        with requests.get(url, stream=True, timeout=TIMEOUT, headers=plain) as response, open(file, "wb") as out:
            if not response.ok:
                answer = f"{response.status_code} {response.reason}"
                raise HybridflError(f"{url}: the server answered {answer}. {INSTEAD}")
            done = 0
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            for chunk in response.raw.stream(CHUNK, decode_content=False):
                out.write(chunk)
                done += len(chunk)
                report(done, total)
    except (requests.RequestException, HTTPError) as error:
        if done is not None:
            raise HybridflError(f"{url}: broke off after {done} bytes ({_cause(error)}). {INSTEAD}") from error
        raise HybridflError(f"{url}: cannot be reached ({_cause(error)}). Check the network. {INSTEAD}") from error


def _cause(error: BaseException) -> str:
    """What the system said first; the libraries wrap it several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def _shown(url: str) -> Iterator[Report]:
    """One line, and on a terminal a live bar below it."""
    print(f"fetching {url}", flush=True)
    if not sys.stdout.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as live:
        task = live.add_task("", total=None)
        yield lambda done, total: live.update(task, completed=done, total=total)


def _unpacked(archive: Path, url: str, members: Mapping[str, str], staging: Path) -> dict[str, Path]:
    """The members by name, each in a file in ``staging`` whose name is not the archive's choice."""
    taken: dict[str, Path] = {}
    try:
        with tarfile.open(archive) as tar:
            for info in tar:
                source = tar.extractfile(info) if info.isreg() and info.name in members else None
                if source is None:
                    continue
                taken[info.name] = staging / f"member-{len(taken)}"
                with source, open(taken[info.name], "wb") as out:
                    shutil.copyfileobj(source, out)
    except (tarfile.TarError, EOFError, zlib.error, LZMAError, gzip.BadGzipFile) as error:
        raise HybridflError(f"{url}: cannot be unpacked ({error}).") from error
    for name, known in members.items():
        if name not in taken:
            raise HybridflError(f"{url}: holds no file {name}.")
        if not _has_hash(taken[name], known):
            raise HybridflError(f"{url}: {name} in it has another checksum than {known}.")
    return taken
