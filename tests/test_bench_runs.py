"""The benchmark's own runs: what is measured and written, also when it is stopped, and its contenders."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from hybridfl.config import Composer, choices
from hybridfl.engine import Engine
from hybridfl.models.building import build_net
from hybridfl.models.options import separated

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

import bench_search  # noqa: E402
import rivals  # noqa: E402
from bench_helpers import TINY, given  # noqa: E402
from benchmark import measure  # noqa: E402
from benchmark.command import parsed, study  # noqa: E402
from benchmark.contenders import Hybridfl, contender  # noqa: E402
from benchmark.memory import children_memory  # noqa: E402
from benchmark.processes import Child, answers  # noqa: E402
from benchmark.progress import progress  # noqa: E402
from benchmark.references import untrained  # noqa: E402
from benchmark.stopping import SIGNALS, Stopped, deferred, listen  # noqa: E402
from benchmark.workloads import WORKLOADS, Images  # noqa: E402


class Local:
    """A contender in this process, which saves the imports of one of its own."""

    def __init__(self, cores: int, **job: Any) -> None:
        self.asks: list[str] = []
        self.answers = answers(job, iter(lambda: self.asks.pop(), ""))

    def answer(self) -> dict[str, Any]:
        return next(self.answers)

    def asked(self, question: str) -> dict[str, Any]:
        self.asks.append(question)
        return next(self.answers)

    def close(self) -> None:
        self.answers.close()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="the system does not tell memory by process")
def test_memory_of_processes_below_is_counted() -> None:
    before = children_memory()  # of processes that other tests keep
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    grandchild = "block = bytearray(b'x' * 2**26); print(flush=True); input()"
    command = [sys.executable, "-c", code, grandchild]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        assert 64 < children_memory() - before < 128
        process.communicate(b"\n")


def test_everything_is_measured_at_toy_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "Child", Local)
    monkeypatch.setattr(Engine, "step", Engine.step)  # put back what the clock replaces
    toy = ["--quick", "--repeats", "2", "--threads", "1", "--workloads", "W1", "W2", "W4"]
    which = [
        "--executors",
        "vectorized",
        "no_such",
        "--rivals",
        "benchmark.references.Plain",
        "--parts",
        "rounds",
        "overhead",
        "convolutions",
    ]
    study(parsed([*toy, *which, "--output-dir", str(tmp_path)]))
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["bench.csv", "bench.png", "machine.json"]
    with (folder / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for workload, limit in (("W1", "channels_last"), ("W2", "by_hand"), ("W4", "by_hand")):
        timed = {(r["contender"], r["repeat"]) for r in rows if (r["workload"], r["quantity"]) == (workload, "round")}
        contenders = ("vectorized", "plain", "central", limit, "benchmark.references.Plain")
        assert timed == {(name, repeat) for name in contenders for repeat in "01"}
        for quantity in ("overhead", "store", "local", "method"):
            found = [r for r in rows if (r["workload"], r["quantity"]) == (workload, quantity)]
            assert [r["repeat"] for r in found] == ["0", "1"]
    steps = [(r["workload"], r["contender"], r["repeat"]) for r in rows if r["quantity"] == "step"]
    assert sorted(steps) == [("W1", way, n) for way in ("alone", "grouped", "unfold", "vmap") for n in "01"]
    assert all(float(row["value"]) > 0 for row in rows)
    assert all(float(row["value"]) < 1 for row in rows if row["quantity"] == "overhead")
    out, told = capsys.readouterr()
    assert "not there: no_such; there are " in told
    for shown in (
        "W4: seconds a round",
        "W1: seconds of a step of all clients",
        "to the limit",
        "W2: vectorized 1 / by_hand 1",
        "peak memory of W4",
        "cores: ",
    ):
        assert shown in out


class Stopping(Local):
    """Somebody presses Ctrl-C at the eleventh round of all."""

    output_dir: ClassVar[Path]
    written: ClassVar[list[int]]
    """Numbers in the file, each time a round is asked for."""

    def asked(self, question: str) -> dict[str, Any]:
        self.written.append(len(measured(self.output_dir)))
        if len(self.written) == 11:
            raise KeyboardInterrupt
        return super().asked(question)


def measured(output_dir: Path) -> list[dict[str, str]]:
    (file,) = output_dir.glob("*/bench.csv")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_run_that_is_stopped_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "Child", Stopping)
    monkeypatch.setattr(Stopping, "output_dir", tmp_path, raising=False)
    monkeypatch.setattr(Stopping, "written", [], raising=False)
    which = ["--workloads", "W2", "--executors", "vectorized", "--threads", "1", "--parts", "rounds", "startup"]
    with pytest.raises(KeyboardInterrupt):
        study(parsed(["--quick", *which, "--output-dir", str(tmp_path)]))
    # Four first rounds do not count; then every number is written before the next is asked for.
    assert Stopping.written == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    rows = measured(tmp_path)
    everybody = ["vectorized", "plain", "central", "by_hand"]
    assert [(r["contender"], r["repeat"]) for r in rows] == [
        *((n, "0") for n in everybody),
        ("plain", "1"),
        ("central", "1"),
    ]
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"bench.csv", "bench.png", "machine.json"}
    out, told = capsys.readouterr()
    medians = {words[1]: words[4] for words in map(str.split, out.splitlines()) if words[1:2] and words[1] in everybody}
    for name in everybody:
        seconds = [float(row["value"]) for row in rows if row["contender"] == name]
        assert medians[name] == f"{np.median(seconds):.4f}"
    assert [line for line in told.splitlines() if line.startswith("W2")] == [
        "W2: rounds, first one of each contender",
        "W2: rounds, repeat 1 of 3",
        "W2: rounds, repeat 2 of 3",
    ]


def belonging_to(folder: Path) -> list[int]:
    """Processes that have the folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder).encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


TELLS = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="the system tells no environments")


@TELLS
def test_a_run_that_is_terminated_leaves_its_numbers_and_no_process(tmp_path: Path) -> None:
    line = "--quick --workloads W2 --executors sequential --threads 1 2 --parts overhead --output-dir"
    with subprocess.Popen(
        [sys.executable, str(SCRIPTS / "bench.py"), *line.split(), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stderr
        told = list(iter(process.stderr.readline, "W2: whole runs, 2 of 2\n"))
        # Itself and the second run, which takes seconds to begin.
        while len(belonging_to(tmp_path)) < 2:
            time.sleep(0.01)
        process.terminate()
        out, last = process.communicate(timeout=60)
    assert "W2: whole runs, 1 of 2\n" in told
    assert process.returncode == 128 + signal.SIGTERM, last
    assert last.endswith("bench: stopped by SIGTERM\n")
    assert belonging_to(tmp_path) == []
    rows = [(row["contender"], row["threads"], row["quantity"]) for row in measured(tmp_path / "out")]
    assert rows.count(("sequential", "1", "overhead")) == 3
    assert {threads for _, threads, _ in rows} == {"1"}
    assert "Of a round in a whole run" in out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@TELLS
def test_a_contender_that_ends_too_early_is_said_and_the_others_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those below them too."""
    given(TINY["W3"], tmp_path)
    program = (
        "import subprocess\nclass Rival:\n    def __init__(self, given):\n        subprocess.Popen(['sleep', '60'])\n"
        "    def round(self, number):\n        assert number == 0\n"
    )
    (tmp_path / "rival.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    job = {
        "file": str(tmp_path / "given.npz"),
        "workload": asdict(TINY["W3"]),
        "line": None,
        "threads": 1,
        "do": "serve",
    }
    good, bad = (Child(1, kind=kind, contender=f"{kind} 1", **job) for kind in ("rival.Rival", "rival.Other"))
    for _ in range(2):  # the second time it is gone when it is asked
        with pytest.raises(SystemExit, match=r"^bench: rival.Other 1 ended with status 1; its error is above.$"):
            bad.asked("round")
    assert good.answer() == {}
    assert 0 < good.asked("round")["seconds"] < 5
    assert 30 < good.asked("memory")["peak"] < 2000
    assert len(belonging_to(tmp_path)) == 2
    Child.end_all()
    assert not Child.alive
    assert good.process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while belonging_to(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert belonging_to(tmp_path) == []


def test_a_signal_is_heard_once_and_not_while_a_process_begins() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    reached = []
    try:
        listen()
        with pytest.raises(Stopped) as stopped:
            with deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("within")
            reached.append("after")
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert reached == ["within"]
    assert stopped.value.status == 143


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for screen, expected in ((io.StringIO(), "W1: a\nW1: b\n"), (Terminal(), "\rW1: a\x1b[K\rW1: b\x1b[K\n")):
        monkeypatch.setattr(sys, "stderr", screen)
        with progress("W1") as tell:
            tell("a")
            tell("b")
        assert screen.getvalue() == expected


def test_a_cold_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    cold, began = (
        Child(1, do="run", line=[*TINY["W3"].line(1), f"output_dir={tmp_path}"], first_only=True),
        time.monotonic(),
    )
    found = cold.answer()
    assert 0 < found["loading"] < found["first"] - began + 5
    cold.close()
    assert cold.process.returncode == 0


def test_every_executor_can_be_a_contender() -> None:
    for name in choices("executor"):
        one = contender(name, 2)
        assert one.overrides[0] == f"executor={name}"
        Hybridfl([*TINY["W3"].line(1), *one.overrides])
    assert "executor.threads=2" in contender("vectorized", 2).overrides


def test_the_references_have_the_nets_of_the_configs() -> None:
    for name in ("W1", "W2", "W5"):
        workload = WORKLOADS[name].small()
        with Composer() as composer:
            model = composer.compose(workload.line(1)).config["model"]
        dataset = Images(workload.train, workload.test, workload.shape).load(Path())
        ours, theirs = separated(model)[1], untrained(workload)
        shapes = [[p.shape for p in net.parameters()] for net in (build_net(ours, dataset, 0), theirs)]
        assert shapes[0] == shapes[1]


def test_rivals_are_named_where_their_simulators_are_missing() -> None:
    found = {
        name
        for name, value in vars(rivals).items()
        if getattr(value, "__module__", "") == "rivals" and hasattr(value, "round")
    }
    assert found == {"FedLab", "PflResearch"}


def test_the_search_and_the_loop_beside_it_see_as_many_examples() -> None:
    prepared, params = bench_search.bench_of(torch.device("cpu"), quick=True)
    seen: list[int] = []
    prepared.net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    bench_search.search(prepared, params, anchors=3, steps=2, batch=4)()
    bench_search.loop(prepared, params, steps=2, batch=4)()
    assert seen == [4, 4, 4, 4]
