"""The command line called in this process, or in one that may be killed, on runs of a fraction of a second."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import hybridfl
from hybridfl.cli import main

SMALL_DATA = ("dataset=synthetic", "dataset.train=200", "dataset.test=100")
SMALL_WORK = (
    "server_data.examples=40",
    "clients.number=5",
    "clients.per_round=2",
    "client_optimizer.epochs=1",
    "model.hidden=[16]",
    "merging.search.steps=5",
    "rounds=4",
    "ui=plain",
)
TINY = (*SMALL_DATA, *SMALL_WORK)
"""Overrides of a run that takes a tenth of a second."""

PRELOADED = ["hydra", "hybridfl.sweep", "hybridfl.compare", "hybridfl.experiment", "preloaded_helpers"]
"""Modules of the process that others are forked from."""

TABLES = ("metrics.csv", "method.csv", "clients.csv")


class Answer(NamedTuple):
    """What a command said; ``both`` in the order it was said."""

    status: int
    out: str
    err: str
    both: str

    @property
    def folder(self) -> Path:
        """The run or sweep named in the last line on standard output."""
        name, _, path = self.out.splitlines()[-1].partition(": ")
        assert name in ("run", "sweep"), self
        assert os.path.isabs(path)
        return Path(path)


class _Tee(io.StringIO):
    def __init__(self, both: io.StringIO) -> None:
        super().__init__()
        self.both = both

    def write(self, text: str) -> int:
        self.both.write(text)
        return super().write(text)


def call(*arguments: str) -> Answer:
    """``hybridfl ARGUMENTS`` in this process."""
    both = io.StringIO()
    out, err = _Tee(both), _Tee(both)
    with redirect_stdout(out), redirect_stderr(err):
        status = main(list(arguments))
    return Answer(status, out.getvalue(), err.getvalue(), both.getvalue())


def done(*arguments: str) -> Path:
    """The folder of a run or sweep that must succeed."""
    answer = call("train", *arguments)
    assert answer.status == 0, answer.both
    return answer.folder


def program(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    """``hybridfl ARGUMENTS`` as typed in a shell.

    The package is the one that is tested here, installed or not; or the one installed for ``HYBRIDFL_PYTHON``.
    """
    installed = os.environ.get("HYBRIDFL_PYTHON")
    paths = [] if installed else [str(Path(hybridfl.__file__).parent.parent)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return subprocess.Popen(
        [installed or sys.executable, "-m", "hybridfl", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(cwd: Path, *arguments: str, file_size: int | None = None, tells_modules: bool = False) -> ForkServerProcess:
    """``hybridfl ARGUMENTS`` in a process of its own: forked, as importing torch again would take seconds.

    Its output goes to ``said-PID.txt`` in ``cwd``. With ``file_size`` no file can grow larger, as on a full disk. The last
    line has the names of all modules that are imported in the end, if ``tells_modules``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_child, args=(str(cwd), arguments, file_size, tells_modules))
    process.start()
    return process


def _child(cwd: str, arguments: Sequence[str], file_size: int | None, tells_modules: bool) -> None:
    os.chdir(cwd)
    output = os.open(f"said-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    status = main(list(arguments))
    if tells_modules:
        print(*sys.modules)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def said(cwd: Path, process: ForkServerProcess) -> str:
    """What a process of :func:`start` printed."""
    file = cwd / f"said-{process.pid}.txt"
    return file.read_text() if file.exists() else ""


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def status_of(run: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((run / "status.json").read_text())
    return fields


def tables(run: Path) -> dict[str, bytes]:
    """The tables of a run as bytes, without the seconds of ``metrics.csv``, its last column but one."""
    found = {name: (run / name).read_bytes() for name in TABLES}
    lines = [line.rsplit(b",", 2) for line in found["metrics.csv"].splitlines(keepends=True)]
    assert lines[0][1:] == [b"seconds", b"sim_seconds\n"]
    assert len(lines) > 1
    found["metrics.csv"] = b"".join(before + b"," + simulated for before, _, simulated in lines)
    return found


def checkpoint_rounds(run: Path) -> list[int]:
    return sorted(int(file.name.split("-")[1]) for file in (run / "checkpoints").glob("round-*.pt"))
