"""Archives that ``hybridfl data fetch`` unpacks: only their stated files, and only below the data root."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import data_command_helpers
import pytest
from data_command_helpers import BATCHES, CONTENTS, Site, batch, get, sha256, tree

from hybridfl.data.cifar import CIFAR10
from hybridfl.data.downloads import Download

site = data_command_helpers.site


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def archive(contents: Sequence[tuple[str, bytes]], links: dict[str, str] | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return packed.getvalue()


def offer(site: Site, monkeypatch: pytest.MonkeyPatch, packed: bytes) -> None:
    """``dataset=cifar10`` is now this archive."""
    site.files["cifar.tar.gz"] = packed
    members = {name: f"md5:{hashlib.md5(content).hexdigest()}" for name, content in CONTENTS.items()}
    download = Download(f"{site.address}cifar.tar.gz", sha256(packed), "cifar10", members)
    monkeypatch.setattr(CIFAR10, "downloads", (download,))


def test_an_archive_is_unpacked_and_not_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(site, monkeypatch, archive([*CONTENTS.items(), ("cifar-10-batches-py/readme.html", b"read me")]))
    told = get("cifar10").out.splitlines()[-1]
    assert told.startswith("cifar10: 10 train and 2 test examples 3x32x32 of 10 classes")
    assert tree() == {f"cifar10/{name}": content for name, content in sorted(CONTENTS.items())}
    site.asked.clear()
    get("cifar10")
    assert site.asked == []
    (Path("root/cifar10") / BATCHES[3]).unlink()
    get("cifar10")
    assert site.asked == ["cifar.tar.gz"]
    assert len(tree()) == 6


def test_nothing_leaves_the_archives_folder(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evil = [
        ("../evil", b"1"),
        ("../../evil", b"2"),
        (f"{tmp_path}/evil", b"3"),
        ("cifar-10-batches-py/../../evil", b"4"),
    ]
    # Followed, the link would lead the batches out of the folder.
    offer(site, monkeypatch, archive([*evil, *CONTENTS.items()], {"cifar-10-batches-py": str(tmp_path / "out")}))
    get("cifar10")
    assert tree(".") == {f"root/cifar10/{name}": content for name, content in sorted(CONTENTS.items())}


SIX = list(CONTENTS.items())


@pytest.mark.parametrize(
    ("packed", "problem"),
    [
        (archive(SIX[:5]), f"holds no file {BATCHES[5]}."),
        (archive(SIX[:5], {BATCHES[5]: "/etc/passwd"}), f"holds no file {BATCHES[5]}."),
        (archive(SIX[:5], {BATCHES[5]: "data_batch_1"}), f"holds no file {BATCHES[5]}."),
        (archive([*SIX[:5], (BATCHES[5], batch(1))]), f"{BATCHES[5]} in it has another checksum than md5:"),
        (archive([*SIX, (BATCHES[0], b"again")]), f"{BATCHES[0]} in it has another checksum than md5:"),
        (b"no archive at all", "cannot be unpacked ("),
        (archive(SIX)[:-2000], "cannot be unpacked ("),
    ],
)
def test_an_archive_without_the_files_leaves_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, packed: bytes, problem: str
) -> None:
    offer(site, monkeypatch, packed)
    answer = get("cifar10", status=1)
    assert answer.err.startswith(f"hybridfl: {site.address}cifar.tar.gz: {problem}")
    assert not Path("root").exists()


@pytest.mark.parametrize("place", ["../x", "a/../../x", "/x", ""])
def test_a_download_stays_below_the_data_root(place: str) -> None:
    for arguments in ((place,), ("folder", {place: "0" * 64})):
        with pytest.raises(ValueError, match=f"'{place}' is no place below the data root"):
            Download("https://example.org/x", "0" * 64, *arguments)


@pytest.mark.parametrize("known", ["0" * 32, "md5:" + "0" * 64, "sha257:" + "0" * 64, ""])
def test_a_checksum_is_one(known: str) -> None:
    for arguments in ((known, "x"), ("0" * 64, "x", {"y": known})):
        with pytest.raises(ValueError, match=f"'{known}' is no checksum; write algorithm:digits"):
            Download("https://example.org/x", *arguments)
