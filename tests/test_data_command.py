"""``hybridfl data``: what is at hand, and downloads from a server of this test, which breaks, lies and refuses."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import os
import pickle
import re
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import Answer, call, program

from hybridfl import data_command, fetch
from hybridfl.build import build
from hybridfl.config import Composer, choices
from hybridfl.data.cifar import CIFAR10
from hybridfl.data.cifar100 import CIFAR100
from hybridfl.data.downloads import About, Download
from hybridfl.data.idx import FILES, MNIST, FashionMNIST
from hybridfl.data.usps import USPS
from hybridfl.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent


class Site(ThreadingHTTPServer):
    """A server of ``files``; ``fault`` is what it does wrong with one of them, ``asked`` the names asked for."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.fault: dict[str, str] = {}
        self.asked: list[str] = []
        self.stalled, self.over = threading.Event(), threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        fault, content = self.server.fault.get(name, ""), self.server.files.get(name, b"")
        if fault == "404" or name not in self.server.files:
            self.send_error(404)
            return
        if fault == "lie":
            content = bytes(reversed(content))
        packs = fault == "packs" and self.headers["Accept-Encoding"] != "identity"
        content = gzip.compress(content) if packs else content
        self.send_response(200)
        if fault != "unsized":
            self.send_header("Content-Length", str(len(content)))
        if fault == "declared" or packs:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault in ("short", "unsized", "stall") else content)
        if fault == "stall":
            self.wfile.flush()
            self.server.stalled.set()
            self.server.over.wait(60)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 2051 if array.ndim == 3 else 2049, *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


RNG = np.random.default_rng(0)
TINY = {
    name: idx(RNG.integers(0, 10, (count, 28, 28) if "images" in name else count, dtype=np.uint8))
    for name, count in zip(FILES, (6, 6, 4, 4), strict=True)
}
"""Four files as MNIST's, of six and four examples."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server from which ``dataset=mnist`` is fetched."""
    with Site(dict(TINY)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        downloads = tuple(Download(server.address + n, sha256(c), f"mnist/{n}") for n, c in TINY.items())
        monkeypatch.setattr(MNIST, "downloads", downloads)
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def get(*arguments: str, status: int = 0) -> Answer:
    answer = call("data", "fetch", *arguments, "--data-root", "root")
    assert answer.status == status, answer.both
    return answer


def tree(folder: str | Path = "root") -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    top = Path(folder)
    return {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}


WHOLE = {f"mnist/{name}": content for name, content in sorted(TINY.items())}

# -- a download that goes well ---------------------------------------------------------------------------------------


def test_files_are_put_where_the_reader_looks_and_read_once(site: Site) -> None:
    answer = get("mnist")
    assert tree() == WHOLE
    assert [path.name for path in Path("root").rglob(".*")] == []
    *fetched, told = answer.out.splitlines()
    assert fetched == [f"fetching {site.address}{name}" for name in FILES]
    found = MNIST().load(Path("root"))
    assert told == (
        f"mnist: 6 train and 4 test examples 1x28x28 of 10 classes, 0.0 MB, licence: CC BY-SA 3.0, "
        f"fingerprint {found.fingerprint}"
    )


def test_others_may_read_the_files_as_they_may_any_new_file(site: Site) -> None:
    before = os.umask(0o027)
    try:
        get("mnist")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in Path("root/mnist").iterdir()}
    assert modes == {0o640}


def test_what_is_there_and_right_is_kept(site: Site) -> None:
    get("mnist")
    site.asked.clear()
    assert "mnist: all files are there already\nmnist: 6 train" in get("mnist", "--force").out
    assert site.asked == []
    (Path("root/mnist") / FILES[2]).unlink()
    get("mnist")
    assert site.asked == [FILES[2]]
    assert tree() == WHOLE


@pytest.mark.parametrize("fault", ["declared", "packs"])
def test_files_come_as_they_are_whatever_a_server_packs(site: Site, fault: str) -> None:
    site.fault = dict.fromkeys(FILES, fault)
    get("mnist")
    assert tree() == WHOLE


def test_a_mirror_has_the_same_names(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tuple(Download(f"http://127.0.0.1:1/{n}?raw=1", sha256(c), f"mnist/{n}") for n, c in TINY.items())
    monkeypatch.setattr(MNIST, "downloads", elsewhere)
    get("mnist", status=1)
    get("mnist", "--mirror", f"{site.address}deep/er/")
    assert tree() == WHOLE


def test_on_a_terminal_a_bar_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with fetch._shown("http://x/y") as report:
        report(2_500_000, 10_000_000)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert shown.startswith("fetching http://x/y\n")
    assert "2.5/10.0 MB" in shown


def test_the_bar_hears_how_much_has_come(site: Site) -> None:
    content = site.files["big"] = bytes(fetch.CHUNK + 1000)
    heard: list[tuple[int, int | None]] = []
    fetch._transfer(f"{site.address}big", "big", None, report=lambda done, total: heard.append((done, total)))
    assert heard == [(fetch.CHUNK, len(content)), (len(content), len(content))]
    assert Path("big").read_bytes() == content


# -- a download that does not ----------------------------------------------------------------------------------------

FAULTS = [
    ("short", r"broke off after \d+ bytes \(.*\d+ more expected.*\)\. Try again later, or name another"),
    ("unsized", r"what came is not the original: its checksum is not [0-9a-f]{64}\. Nothing is kept\."),
    ("lie", r"what came is not the original: its checksum is not [0-9a-f]{64}\. Nothing is kept\."),
    ("404", r"the server answered 404 Not Found\."),
]


@pytest.mark.parametrize(("fault", "problem"), FAULTS)
def test_a_bad_download_leaves_nothing(site: Site, fault: str, problem: str) -> None:
    site.fault = {FILES[0]: fault}
    answer = get("mnist", status=1)
    assert re.match(f"hybridfl: {site.address}{FILES[0]}: {problem}", answer.err), answer.err
    assert answer.err.count("\n") == 1
    assert not Path("root").exists()
    site.fault = {FILES[2]: fault}
    get("mnist", status=1)
    assert tree() == {f"mnist/{name}": TINY[name] for name in FILES[:2]}
    site.fault, site.asked = {}, []
    get("mnist")
    assert site.asked == list(FILES[2:])


def test_no_server(site: Site) -> None:
    answer = get("mnist", "--mirror", "http://127.0.0.1:1", status=1)
    problem = "cannot be reached (Connection refused). Check the network. Try again later, or name another address"
    assert answer.err.startswith(f"hybridfl: http://127.0.0.1:1/{FILES[0]}: {problem}")
    assert not Path("root").exists()


def test_a_name_that_is_no_servers(site: Site) -> None:
    answer = get("mnist", "--mirror", "http://nowhere.invalid/", status=1)
    assert f"hybridfl: http://nowhere.invalid/{FILES[0]}: cannot be reached (" in answer.err
    assert "HTTPConnectionPool" not in answer.err


def test_another_file_of_the_same_name_is_kept_unless_forced(site: Site) -> None:
    get("mnist")
    own = Path("root/mnist") / FILES[1]
    own.write_bytes(b"mine")
    site.asked.clear()
    answer = get("mnist", status=2)
    problem = "has another content than the public original. Move it away, or replace it with --force."
    assert answer.err == f"hybridfl: {own}: {problem}\n"
    assert (own.read_bytes(), site.asked) == (b"mine", [])
    site.fault = {FILES[1]: "short"}
    get("mnist", "--force", status=1)
    assert own.read_bytes() == b"mine", "what was there goes only when there is something better"
    site.fault, site.asked = {}, []
    get("mnist", "--force")
    assert (tree(), site.asked) == (WHOLE, [FILES[1]])


def test_the_wrong_file_of_one_set_stops_all(site: Site) -> None:
    folder = Path("root/cifar10/cifar-10-batches-py")
    folder.mkdir(parents=True)
    (folder / "data_batch_3").write_bytes(b"mine")
    assert "data_batch_3: has another content" in get("mnist", "cifar10", status=2).err
    assert site.asked == []


def test_files_that_are_the_originals_but_cannot_be_read_are_an_error(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = TINY[FILES[0]][:-30]
    site.files[FILES[0]] = broken
    first = Download(site.address + FILES[0], sha256(broken), f"mnist/{FILES[0]}")
    monkeypatch.setattr(MNIST, "downloads", (first, *MNIST.downloads[1:]))
    answer = get("mnist", status=2)
    assert answer.err.startswith(f"hybridfl: mnist: root/mnist/{FILES[0]}: truncated")


@pytest.mark.parametrize("root", ["taken", "taken/below"])
def test_a_data_root_that_is_no_folder(site: Site, root: str) -> None:
    Path("taken").write_text("mine")
    answer = call("data", "fetch", "mnist", "--data-root", root)
    assert answer.status == 2
    assert answer.err.startswith(f"hybridfl: --data-root: cannot write to '{root}/mnist' (Not a directory)")
    assert tree(".") == {"taken": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_data_root_that_is_not_ours(site: Site) -> None:
    Path("root").mkdir(mode=0o500)
    answer = get("mnist", status=2)
    assert answer.err.startswith("hybridfl: --data-root: cannot write to 'root/mnist' (Permission denied)")


def test_a_full_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    answer = get("mnist", status=1)
    assert answer.err == f"hybridfl: root/mnist/{FILES[0]}: cannot be written (No space left on device).\n"
    assert not Path("root").exists()


USERS = """
import gzip
from typing import ClassVar

import numpy as np

from hybridfl.data.dataset import Dataset, Examples, readable
from hybridfl.data.downloads import Download


class Letters:
    downloads: ClassVar[tuple[Download, ...]] = (Download("{url}", "{hash}", "letters/{name}"),)

    def load(self, root):
        with gzip.open(root / "letters/{name}") as stream:
            y = np.frombuffer(stream.read()[8:], np.uint8).astype(np.int64)
        part = Examples(np.zeros((len(y), 1, 2, 2), np.uint8), y)
        return Dataset("letters", part, part, 10, (0.0,), (1.0,))


class Unstated:
    def load(self, root):
        open(root / "unstated.bin")


class Wrapped:
    def load(self, root):
        with readable(root / "wrapped.bin", "Put it there."), open(root / "wrapped.bin"):
            pass


class Generated:
    def load(self, root):
        part = Examples(np.zeros((3, 1, 2, 2), np.uint8), np.zeros(3, np.int64))
        return Dataset("generated", part, part, 10, (0.0,), (1.0,))


class Raises(Generated):
    licence: ClassVar[str] = "CC0"

    def load(self, root):
        raise RuntimeError("no such luck")


class WrongPart(Generated):
    def load(self, root):
        return "a data set"


class WrongList(Generated):
    downloads = ["https://example.org"]


class Needs(Generated):
    def __init__(self, images: str):
        self.images = images
"""
NODES = {
    "letters": "_target_: lettersets.Letters\n",
    "unstated": "_target_: lettersets.Unstated\n",
    "wrapped": "_target_: lettersets.Wrapped\n",
    "generated": "_target_: lettersets.Generated\n",
    "raises": "_target_: lettersets.Raises\n",
    "wrong_part": "_target_: lettersets.WrongPart\n",
    "wrong_list": "_target_: lettersets.WrongList\n",
    "needs": "_target_: lettersets.Needs\nimages: ???\n",
    "nowhere": "_target_: lettersetz.Needs\n",
    "no_yaml": "_target_: [\n",
}


@pytest.fixture
def users(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Readers and a config folder of the user's, ``own``; ``dataset=letters`` has one of the server's files."""
    name = FILES[1]
    text = USERS.replace("{url}", site.address + name).replace("{name}", name).replace("{hash}", sha256(TINY[name]))
    Path("lettersets.py").write_text(text)
    Path("own/dataset").mkdir(parents=True)
    for node, content in NODES.items():
        Path(f"own/dataset/{node}.yaml").write_text(content)
    yield site
    sys.modules.pop("lettersets", None)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_download_that_is_stopped(users: Site, how: signal.Signals) -> None:
    users.fault = {FILES[1]: "stall"}
    line = ("data", "fetch", "letters", "--config-dir", "own", "--data-root", "root")
    with program(Path.cwd(), *line) as process:
        assert users.stalled.wait(60)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    if how == signal.SIGKILL:
        assert [name for name in tree() if "/.fetch-" not in name] == []
    else:
        assert (process.returncode, err) == (
            130,
            "hybridfl: interrupted; the same command continues where it stopped.\n",
        )
        assert not Path("root").exists()
    users.over.set()
    users.fault = {}
    get("letters", "--config-dir", "own")
    assert tree()[f"letters/{FILES[1]}"] == TINY[FILES[1]]


def test_what_a_killed_download_left_goes_after_a_day(site: Site) -> None:
    for name, age in (("old", fetch.STALE + 100), ("new", 100)):
        left = Path(f"root/mnist/.fetch-{name}")
        left.mkdir(parents=True)
        (left / "part").write_bytes(b"half")
        os.utime(left, (time.time() - age, time.time() - age))
    get("mnist")
    assert tree() == WHOLE | {"mnist/.fetch-new/part": b"half"}


# -- archives --------------------------------------------------------------------------------------------------------

BATCHES = tuple(CIFAR10.downloads[0].unpack)


def batch(seed: int) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, (2, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": data, b"labels": [seed, 9]}, protocol=4)


CONTENTS = {name: batch(seed) for seed, name in enumerate(BATCHES)}


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


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mnits", r"mnits: unknown data set\. Did you mean 'mnist'\? Valid: chars74k_fonts, "),
        ("digits", "digits: there is nothing to fetch, it needs no files."),
        (
            "mnist_m",
            "mnist_m: cannot be fetched. Its authors .* Put mnist_m.npz with the arrays x_train, .* in root/mnist_m,",
        ),
        (
            "chars74k_street",
            "chars74k_street: cannot be fetched. The original .* Put street_digits.npz with the arrays",
        ),
        ("femnist_digits", "femnist_digits: cannot be fetched. LEAF .* Put femnist_digits.npz with the arrays"),
        ("pacs", "pacs: cannot be fetched. Its images, .* Put a folder or zip of images for every domain in root/pacs"),
        ("image_folder", "image_folder: cannot be fetched. The images are your own. .* for every class in root/images"),
        ("unstated", "unstated: cannot be fetched. Its reader names no public files. FileNotFoundError: "),
        ("generated", "generated: cannot be fetched. Its reader names no public files. It is at hand below root."),
        (
            "wrong_list",
            r"dataset._target_: WrongList.downloads is \['https://example.org'\], expected a tuple of Download.",
        ),
    ],
)
def test_a_name_that_cannot_be_fetched_is_refused_before_any_download(users: Site, name: str, problem: str) -> None:
    answer = get("mnist", name, "--config-dir", "own", status=2)
    assert re.match(f"hybridfl: {problem}", answer.err), answer.err
    assert (users.asked, Path("root").exists()) == ([], False)


def test_a_mirror_that_cannot_serve(site: Site) -> None:
    answer = get("mnist", "--mirror", "ftp://example.org", status=2)
    assert answer.err.startswith("hybridfl: --mirror: got 'ftp://example.org': expected an address that begins with")
    answer = get("mnist", "fashion_mnist", "--mirror", site.address, status=2)
    assert answer.err == (
        f"hybridfl: --mirror: mnist and fashion_mnist have different files named {FILES[0]}; fetch one after the other.\n"
    )
    assert site.asked == []


# -- the list --------------------------------------------------------------------------------------------------------


def listed(*arguments: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The table by name and column, and the lines below it."""
    answer = call("data", "list", *arguments)
    assert (answer.status, answer.err) == (0, "")
    return parsed(answer.out)


def parsed(text: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    first, empty, header, *lines = text.splitlines()
    assert (first.startswith("data root: "), empty) == (True, "")
    end = lines.index("") if "" in lines else len(lines)
    columns = re.split(r" {2,}", header)
    rows = [dict(zip(columns, re.split(r" {2,}", line), strict=True)) for line in lines[:end]]
    return {row["name"]: row for row in rows}, lines[end + 1 :]


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Fewer choices, as composing each takes a while."""
    chosen = data_command.choices
    monkeypatch.setattr(
        data_command, "choices", lambda group, extra=None: {n: f for n, f in chosen(group, extra).items() if n in names}
    )


def test_a_list_of_nothing_needs_no_torch_and_no_network() -> None:
    modules, out = imported("{'torch', 'pandas', 'sklearn', 'pooch', 'requests', 'rich'}", ["data", "list"])
    assert modules == ""
    table, below = parsed(out)
    assert list(table) == list(choices("dataset"))
    assert below == []
    assert {name for name, row in table.items() if row["state"] == "built in"} == {"digits", "domains", "synthetic"}
    assert {row["state"] for row in table.values()} == {"missing", "built in"}
    assert {name for name, row in table.items() if row["fetch"] == "yes"} == {
        "mnist", "fashion_mnist", "cifar10", "cifar100", "usps",
    }  # fmt: skip
    assert {row["licence"] for row in table.values()}.isdisjoint({"unknown", "–"})
    expected = {"train": "1,352", "test": "445", "image": "1x8x8", "classes": "10", "size": "–", "fetch": "–"}
    assert expected.items() <= table["digits"].items()
    assert (
        table["mnist"].items()
        >= dict.fromkeys(("train", "test", "image", "classes", "size", "fingerprint"), "–").items()
    )
    assert not Path("root").exists()


def test_what_is_there_is_listed_with_its_numbers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "mnist", "fashion_mnist")
    get("mnist")
    monkeypatch.setenv("HYBRIDFL_DATA", "root")
    table, below = listed()
    found = MNIST().load(Path("root"))
    size = sum(map(len, TINY.values()))
    assert table["mnist"] == {
        "name": "mnist", "state": "present", "train": "6", "test": "4", "image": "1x28x28", "classes": "10",
        "size": f"{size / 1e6:.1f} MB", "fingerprint": found.fingerprint, "fetch": "yes", "licence": "CC BY-SA 3.0",
    }  # fmt: skip
    assert (table["fashion_mnist"]["state"], below) == ("missing", [])


def test_the_data_root_is_that_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, "digits")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HYBRIDFL_DATA", raising=False)
    assert call("data", "list").out.startswith(f"data root: {tmp_path}/.cache/hybridfl\n")
    monkeypatch.setenv("HYBRIDFL_DATA", "there")
    assert call("data", "list").out.startswith("data root: there\n")
    assert call("data", "list", "--data-root", "~/x").out.startswith(f"data root: {tmp_path}/x\n")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda file: file.write_bytes(TINY[FILES[2]][:-20]), "truncated, the packed stream ends too early"),
        (lambda file: file.write_bytes(b"something else"), "cannot be read"),
        (lambda file: file.write_bytes(idx(np.ones(99, np.uint8))), "magic number 2049, expected 2051"),
        (lambda file: file.unlink(), "not found"),
    ],
)
def test_a_broken_set_is_told_and_does_not_stop_the_list(
    site: Site, monkeypatch: pytest.MonkeyPatch, damage: Any, problem: str
) -> None:
    only(monkeypatch, "mnist", "usps")
    get("mnist")
    damage(Path("root/mnist") / FILES[2])
    table, below = listed("--data-root", "root")
    assert (table["mnist"]["state"], table["mnist"]["train"], table["usps"]["state"]) == ("broken", "–", "missing")
    assert table["mnist"]["size"].endswith(" MB")
    assert len(below) == 1
    assert below[0].startswith(f"mnist: root/mnist/{FILES[2]}: {problem}")


def test_a_users_sets_are_listed_whatever_they_do(users: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, *NODES)
    table, below = listed("--data-root", "root", "--config-dir", "own")
    assert {name: (row["state"], row["fetch"], row["licence"]) for name, row in table.items()} == {
        "generated": ("present", "no", "unknown"),
        "letters": ("missing", "yes", "unknown"),
        "needs": ("missing", "no", "unknown"),
        "no_yaml": ("broken", "no", "unknown"),
        "nowhere": ("broken", "no", "unknown"),
        "raises": ("broken", "no", "CC0"),
        "unstated": ("missing", "no", "unknown"),
        "wrapped": ("missing", "no", "unknown"),
        "wrong_list": ("broken", "no", "unknown"),
        "wrong_part": ("broken", "no", "unknown"),
    }
    told = dict(line.split(": ", 1) for line in below)
    assert told.pop("no_yaml").startswith("--config-dir: ")
    assert told.pop("nowhere").startswith("dataset._target_: cannot import 'lettersetz.Needs'")
    assert told == {
        "raises": "RuntimeError: no such luck",
        "wrong_list": "dataset._target_: WrongList.downloads is ['https://example.org'], expected a tuple of Download.",
        "wrong_part": "dataset._target_: lettersets.WrongPart.load gave a str, expected a hybridfl.data.dataset.Dataset.",
    }


def test_the_size_of_a_folder_is_that_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "image_folder")
    Path("root/images/a").mkdir(parents=True)
    Path("root/images/b").mkdir()
    Path("root/images/a/0.png").write_bytes(bytes(1_500_000))
    Path("root/images/b/1.png").write_bytes(bytes(2_000_000))
    table, below = listed("--data-root", "root")
    assert (table["image_folder"]["state"], table["image_folder"]["size"]) == ("broken", "3.5 MB")
    assert [line.partition(":")[0] for line in below] == ["image_folder"]


# -- what the readers state ------------------------------------------------------------------------------------------


def reader_of(name: str) -> Any:
    with Composer() as composer:
        return build(composer.compose([f"dataset={name}"]).config["dataset"], "dataset")


@pytest.mark.parametrize("name", choices("dataset"))
def test_every_shipped_set_says_what_it_is_and_how_to_get_it(name: str, tmp_path: Path) -> None:
    reader = reader_of(name)
    stated = About.of(reader)
    assert stated.licence != About().licence
    assert stated.files is not None
    assert (stated.files == ()) + bool(stated.downloads) + bool(stated.by_hand) == 1
    assert stated.by_hand == "" or stated.by_hand.endswith(".")
    if stated.files:
        with pytest.raises(DataError, match=f"^{tmp_path / stated.files[0]}: not found. Put "):
            reader.load(tmp_path)


LABELLED = pickle.dumps(
    {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [99], b"coarse_labels": [19]}, protocol=4
)
LINE = bz2.compress(b"10 1:-1 256:0.5")
SMALL = {**TINY, "train": LABELLED, "test": LABELLED, "usps.bz2": LINE, "usps.t.bz2": LINE}
SMALL |= {Path(name).name: content for name, content in CONTENTS.items()}


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "usps"])
def test_what_is_fetched_is_what_the_reader_reads(name: str, tmp_path: Path) -> None:
    reader = reader_of(name)
    places = [place for download in reader.downloads for place in download.files]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(SMALL[Path(place).name])
    assert reader.load(tmp_path).name == name
    for place in places:
        (tmp_path / place).rename("aside")
        with pytest.raises(DataError, match=f"{place}: not found"):
            reader.load(tmp_path)
        Path("aside").rename(tmp_path / place)


@pytest.mark.parametrize("reader", [MNIST, FashionMNIST])
def test_real_originals_have_the_checksums_stated(reader: type[MNIST], real: Path) -> None:
    assert fetch.missing(reader.downloads, real) == []


@pytest.mark.parametrize("reader", [CIFAR10, CIFAR100, USPS])
def test_real_files_that_are_not_the_originals_are_noticed(reader: type[USPS], real: Path) -> None:
    if not (real / next(iter(reader.downloads[0].files))).exists():
        pytest.skip("not in HYBRIDFL_DATA")
    try:
        assert fetch.missing(reader.downloads, real) == []
    except DataError as error:
        assert "has another content than the public original" in str(error)


def test_a_statement_of_the_wrong_type_is_refused() -> None:
    for attribute, value in (("licence", None), ("downloads", []), ("files", "mnist"), ("files", (1,)), ("by_hand", 3)):
        reader = type("Reader", (), {attribute: value})()
        with pytest.raises(ConfigError, match=rf"_target_: Reader\.{attribute} is .*, expected a t"):
            About.of(reader)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [["--help"], ["data", "--help"], ["data", "list", "-h"], ["data", "fetch", "-h"]])
def test_help_imports_nothing_heavy(line: list[str]) -> None:
    heavy = "{'torch', 'hydra', 'omegaconf', 'numpy', 'pandas', 'pooch', 'requests', 'rich'}"
    modules, out = imported(heavy, line)
    assert modules == ""
    assert line != ["--help"] or "data Which data sets" in " ".join(out.split())


def imported(heavy: str, line: list[str]) -> tuple[str, str]:
    """Which of the modules ``heavy`` a command imports, and what it prints."""
    code = (
        "import sys; from hybridfl.cli import main; status = main(sys.argv[1:]); "
        f"print(*({heavy} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HYBRIDFL_DATA": "root"}
    run = subprocess.run([sys.executable, "-c", code, *line], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr.strip(), run.stdout


@pytest.mark.parametrize(("line", "problem"), [([], "COMMAND"), (["fetch"], "NAME"), (["lisst"], "lisst")])
def test_a_line_that_is_incomplete_or_wrong(line: list[str], problem: str) -> None:
    answer = call("data", *line)
    assert answer.status == 2
    assert problem in answer.err.splitlines()[-1]
