"""``hybridfl data fetch``: what is fetched, what is left when it fails, and how a line is read."""

from __future__ import annotations

import io
import os
import re
import signal
import stat
import sys
import time
from pathlib import Path

import data_command_helpers
import pytest
from cli_helpers import call, program
from data_command_helpers import TINY, WHOLE, Site, get, imported, sha256, tree

from hybridfl import fetch
from hybridfl.data.downloads import Download
from hybridfl.data.idx import FILES, MNIST

site = data_command_helpers.site
users = data_command_helpers.users
_alone = data_command_helpers._alone


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


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [["--help"], ["data", "--help"], ["data", "list", "-h"], ["data", "fetch", "-h"]])
def test_help_imports_nothing_heavy(line: list[str]) -> None:
    heavy = "{'torch', 'hydra', 'omegaconf', 'numpy', 'pandas', 'pooch', 'requests', 'rich'}"
    modules, out = imported(heavy, line)
    assert modules == ""
    assert line != ["--help"] or "data Which data sets" in " ".join(out.split())


@pytest.mark.parametrize(("line", "problem"), [([], "COMMAND"), (["fetch"], "NAME"), (["lisst"], "lisst")])
def test_a_line_that_is_incomplete_or_wrong(line: list[str], problem: str) -> None:
    answer = call("data", *line)
    assert answer.status == 2
    assert problem in answer.err.splitlines()[-1]
