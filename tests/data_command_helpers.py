"""A server of small data sets in this process, and the program that fetches them."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import Answer, call

from hybridfl.data.cifar import CIFAR10
from hybridfl.data.downloads import Download
from hybridfl.data.idx import FILES, MNIST

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


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


BATCHES = tuple(CIFAR10.downloads[0].unpack)


def batch(seed: int) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, (2, 3072), dtype=np.uint8)
    return pickle.dumps({b"data": data, b"labels": [seed, 9]}, protocol=4)


CONTENTS = {name: batch(seed) for seed, name in enumerate(BATCHES)}


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
