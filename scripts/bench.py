"""How far a round of hybridfl is from the fastest way to do the same arithmetic, in one run on one machine.

    python scripts/bench.py                                   all workloads; with two quiet cores some ten minutes
    python scripts/bench.py --workloads W3 --threads 1 --parts rounds
    python scripts/bench.py --quick                           everything once at toy sizes, to see that it works

The same 60,000 images, the same clients and cohorts for all: W1 a small convolutional net, W2 a perceptron, W3 the
perceptron with many small clients, W4 with so many that they share examples. Every contender lives in a process of its
own and does a round when asked, one after the other, again and again: what slows the machine down slows all of them.
The references at the end of the file are plain torch on the same examples: the loop that everybody writes, and the limits,
one model trained on as many batches as the cohort has, without copies and means. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LR, BATCH = 0.05, 32
MEAN, STD = 127.0, 58.0
PARTS = ("rounds", "overhead", "startup")
COLUMNS = ("part", "workload", "contender", "threads", "repeat", "quantity", "value", "unit")
KNOBS = ("threads", "number")
"""Options of an executor that say how many cores it uses."""
CONFIDENCE, RESAMPLES = 0.95, 10_000


# -- workloads ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """Attributes:
    net: a config node.
    partitioning: overrides.
    clients, per_round: of all, and in a round.
    together: rounds that are timed as one, where one is too short.
    train, test: numbers of images.
    """

    name: str
    net: str
    partitioning: tuple[str, ...]
    clients: int
    per_round: int
    together: int
    train: int = 60_000
    test: int = 10_000

    def line(self, rounds: int) -> list[str]:
        """Overrides of a run."""
        return [
            "baseline=fedavg",
            "~dataset",
            f"+dataset={{_target_:bench.Images,train:{self.train},test:{self.test}}}",
            *self.partitioning,
            "server_data=none",
            f"clients.number={self.clients}",
            f"clients.per_round={self.per_round}",
            *([] if self.net == "mlp" else ["~model"]),
            "model.hidden=[64]" if self.net == "mlp" else f"+model={{_target_:{self.net}}}",
            f"client_optimizer.lr={LR}",
            f"client_optimizer.batch_size={BATCH}",
            "client_optimizer.epochs=1",
            f"rounds={rounds}",
            "device=cpu",
            "ui=none",
        ]

    def small(self) -> Workload:
        """The same at a toy size."""
        clients = {100: 8, 1000: 20, 10_000: 100}[self.clients]
        return replace(self, clients=clients, per_round=4, together=1, train=1200, test=200)


SKEWED = ("partitioning=dirichlet", "partitioning.alpha=0.3", "partitioning.min_examples=20")
SHARED = ("~partitioning", "+partitioning={_target_:bench.WithReplacement,size:60}")
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "bench.Conv", SKEWED, clients=100, per_round=10, together=1),
        Workload("W2", "mlp", SKEWED, clients=100, per_round=10, together=4),
        Workload("W3", "mlp", ("partitioning=iid",), clients=1000, per_round=100, together=3),
        Workload("W4", "mlp", SHARED, clients=10_000, per_round=100, together=3),
    )
}


def images(train: int, test: int) -> tuple[np.ndarray, np.ndarray]:
    """28 × 28 images of ten classes ``(train + test, 1, 28, 28)`` uint8, and labels of which a fifth are random.

    Without those the loss would vanish within a few rounds, and arithmetic on nearly nothing has a speed of its own.
    """
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, train + test)
    prototypes = rng.integers(0, 64, (10, 1, 28, 28), dtype=np.uint8)
    x = rng.integers(0, 192, (len(y), 1, 28, 28), dtype=np.uint8)
    for label in range(10):
        x[y == label] += prototypes[label]
    noisy = rng.random(len(y)) < 0.2
    y[noisy] = rng.integers(0, 10, noisy.sum())
    return x, y


@dataclass(frozen=True)
class Images:
    """:func:`images` as a config node of the group ``dataset``."""

    seconds: ClassVar[float] = 0.0

    train: int = 60_000
    test: int = 10_000

    def load(self, root: Path) -> Any:
        from hybridfl.data.dataset import Dataset, Examples

        began = time.perf_counter()
        x, y = images(self.train, self.test)
        train, test = Examples(x[: self.train], y[: self.train]), Examples(x[self.train :], y[self.train :])
        Images.seconds = time.perf_counter() - began
        return Dataset("bench", train, test, 10, (MEAN,), (STD,))


@dataclass(frozen=True)
class WithReplacement:
    """A partitioning in which every client draws ``size`` of all examples with replacement."""

    size: int = 60
    seed: int | None = None

    def split(self, labels: Any, clients: int, rng: np.random.Generator) -> Any:
        from hybridfl.data.partitioning import Partition

        shares = [np.sort(rng.integers(0, len(labels), self.size)) for _ in range(clients)]
        return Partition(shares, complete=False, shared=True)


# -- contenders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """Attributes:
    kind: an executor, a reference, or the dotted path of a class of the user's.
    threads: how many cores it may use; of an executor with worker processes, their number.
    overrides: of an executor.
    """

    kind: str
    threads: int
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.kind} {self.threads}"

    @property
    def processes(self) -> bool:
        """Whether it has processes of one thread each instead of threads."""
        return any(text.startswith("executor.number=") for text in self.overrides)


def contender(executor: str, threads: int) -> Contender:
    """An executor with so many threads, or so many processes, whatever it has."""
    import yaml

    from hybridfl.config import choices

    node = yaml.safe_load(choices("executor")[executor].read_text(encoding="utf-8"))
    knobs = [f"executor.{knob}={threads}" for knob in KNOBS if knob in node]
    return Contender(executor, threads, (f"executor={executor}", *knobs))


class Runner(Protocol):
    """What does a contender's rounds, in a process of its own."""

    def round(self, number: int) -> None: ...


class Hybridfl:
    """The engine's rounds without evaluation."""

    def __init__(self, line: Sequence[str]) -> None:
        from hybridfl.config import Composer
        from hybridfl.plan import make_plan

        with Composer() as composer:
            composed = composer.compose(line)
        self.plan = make_plan(composed)
        torch.set_num_threads(self.plan.settings.executor.threads)
        self.engine = self.plan.engine()
        self.snapshot = self.engine.begin()

    def round(self, number: int) -> None:
        assert self.snapshot.round == number
        self.snapshot, _ = self.engine.step(self.snapshot)


def write_given(runner: Hybridfl, rounds: int, file: Path) -> None:
    """What the references need to train the same clients from the same weights."""
    federation, schedule = runner.plan.federation, runner.engine.schedule
    shares = [federation.owned(client) for client in range(federation.clients.number)]
    np.savez(
        file,
        rows=np.concatenate(shares),
        sizes=np.array([len(share) for share in shares]),
        cohorts=np.array([[arrival.client for arrival in schedule.born(r)] for r in range(rounds)]),
        **{f"start {i}": tensor.numpy() for i, tensor in enumerate(federation.start.params.values())},
    )


# -- one process a contender -------------------------------------------------------------------------------------------


class Child:
    """A process of this script that answers lines of JSON."""

    def __init__(self, cores: int, **job: Any) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
        self.what = job.get("contender", job["do"])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: {self.what} ended with status {self.process.wait()}; its error is above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def asked(self, question: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def answers(job: dict[str, Any], questions: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The other side: what was prepared, then a round for every question."""
    if job["do"] == "given":
        write_given(Hybridfl(job["line"]), job["rounds"], Path(job["file"]))
        yield {}
    elif job["do"] == "run":
        yield whole_run(job["line"], job["first_only"])
    else:
        runner, number = made(job), 0
        yield {}
        for question in questions:
            if question.strip() == "memory":
                yield {"peak": own_peak() + children_memory()}
                continue
            began = time.perf_counter()
            runner.round(number)
            yield {"seconds": time.perf_counter() - began}
            number += 1


def say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def made(job: dict[str, Any]) -> Runner:
    if job["line"]:
        return Hybridfl(job["line"])
    torch.set_num_threads(job["threads"])
    given = Given.read(Path(job["file"]), Workload(**job["workload"]))
    if job["kind"] in REFERENCES:
        return REFERENCES[job["kind"]](given)
    module, _, name = job["kind"].rpartition(".")
    rival: Runner = getattr(importlib.import_module(module), name)(given)
    return rival


def own_peak() -> float:
    """MiB, the most that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def children_memory() -> float:
    """MiB that worker processes hold by themselves now, beside what they share."""
    return sum(map(_private, _descendants(os.getpid())))


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for found in map(int, task.read_text().split()):
            yield found
            yield from _descendants(found)


def _private(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 2**10


# -- a whole run -------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """When each round of a run begins and ends, and how much of it is local work or the method's own arithmetic.

    Attributes:
        first_only: tell when the first round begins, and end the process.
        children: MiB of worker processes after the first round.
    """

    first_only: bool
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    local: list[float] = field(default_factory=list)
    method: list[float] = field(default_factory=list)
    children: float = 0.0

    def attach(self) -> None:
        from hybridfl.engine import Engine

        step = Engine.step

        def timed(engine: Any, before: Any) -> Any:
            if self.first_only:
                found = {"first": time.monotonic(), "loading": Images.seconds}
                os.write(1, f"{json.dumps(found)}\n".encode())
                os._exit(0)
            if not self.began:
                engine.executor, engine.method.round = self.executor(engine.executor), self.round(engine.method.round)
            self.local.append(0.0)
            self.method.append(0.0)
            self.began.append(time.perf_counter())
            found = step(engine, before)
            self.ended.append(time.perf_counter())
            if len(self.ended) == 1:  # in the round that is not counted, as it takes a while
                self.children = children_memory()
            return found

        Engine.step = timed  # type: ignore[method-assign]

    def executor(self, inner: Any) -> Any:
        clock = self

        class Timed:
            threads = inner.threads

            def run(self, bench: Any, tasks: Any) -> Any:
                began = time.perf_counter()
                outcomes = inner.run(bench, tasks)
                clock.local[-1] += time.perf_counter() - began
                return outcomes

        return Timed()

    def round(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def timed(state: Any, now: Any) -> Iterator[Any]:
            conversation, answer = inner(state, now), None
            while True:
                began = time.perf_counter()
                try:
                    jobs = conversation.send(answer)
                except StopIteration as stop:
                    return stop.value
                finally:
                    self.method[-1] += time.perf_counter() - began
                answer = yield jobs

        return timed


def whole_run(line: Sequence[str], first_only: bool) -> dict[str, Any]:
    """``hybridfl train`` in this process, with a clock; with ``first_only`` the process ends where the first round begins."""
    from hybridfl.cli import main

    clock = Clock(first_only)
    clock.attach()
    with redirect_stdout(io.StringIO()):
        status = main(["train", *line])
    if status:
        raise SystemExit(status)
    rounds = zip(clock.began, clock.ended, clock.began[1:], clock.local, clock.method, strict=False)
    # The last round is left out, as evaluation follows it, and so is the first.
    found = [
        {"round": following - began, "store": following - ended, "local": local, "method": method}
        for began, ended, following, local, method in rounds
    ]
    return {"rounds": found[1:], "peak": own_peak() + clock.children}


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """Everything that was measured, one number a row."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, part: str, workload: str, who: Contender, repeat: int, quantity: str, value: float, unit: str
    ) -> None:
        row = (part, workload, who.kind, who.threads, repeat, quantity, value, unit)
        self.rows.append(dict(zip(COLUMNS, row, strict=True)))

    def values(self, workload: str, label: str, quantity: str) -> list[float]:
        return [
            row["value"]
            for row in self.rows
            if (row["workload"], f"{row['contender']} {row['threads']}", row["quantity"]) == (workload, label, quantity)
        ]

    def labels(self, workload: str, quantity: str) -> list[str]:
        found = [
            f"{row['contender']} {row['threads']}"
            for row in self.rows
            if (row["workload"], row["quantity"]) == (workload, quantity)
        ]
        return list(dict.fromkeys(found))


def references(workload: Workload, threads: Sequence[int]) -> list[Contender]:
    if workload.net != "mlp":
        return [Contender(kind, 1) for kind in ("plain", "central", "channels_last")]
    return [Contender(kind, t) for t in threads for kind in ("plain", "central", "by_hand")]


def measure_rounds(
    workload: Workload, contenders: Sequence[Contender], repeats: int, folder: Path, record: Record
) -> None:
    """All contenders' rounds in turn; the first of each is not counted."""
    rounds, given = 1 + repeats * workload.together, folder / f"{workload.name}.npz"
    line = workload.line(rounds)
    prepare = Child(1, do="given", line=line, rounds=rounds, file=str(given))
    prepare.answer()
    prepare.close()
    children = {}
    for one in contenders:
        children[one] = Child(
            1 if one.processes else one.threads,
            do="serve",
            contender=one.label,
            kind=one.kind,
            line=[*line, *one.overrides] if one.overrides else None,
            threads=one.threads,
            file=str(given),
            workload=asdict(workload),
        )
    for process in children.values():
        process.answer()
    for process in children.values():
        process.asked("round")
    for repeat in range(repeats):
        # Whoever comes after a slow one finds the caches as that one left them; so the order turns.
        turn = repeat % len(contenders)
        for one in [*contenders[turn:], *contenders[:turn]]:
            seconds = sum(children[one].asked("round")["seconds"] for _ in range(workload.together))
            record.add("rounds", workload.name, one, repeat, "round", seconds / workload.together, "s")
    for one, process in children.items():
        record.add("rounds", workload.name, one, 0, "peak", process.asked("memory")["peak"], "MiB")
        process.close()


def measure_overhead(workload: Workload, one: Contender, rounds: int, folder: Path, record: Record) -> None:
    """A whole ``hybridfl train``: what of its rounds is neither local work nor the method's arithmetic."""
    line = [*workload.line(rounds), *one.overrides, f"evaluate_every={rounds}"]
    line.append(f"output_dir={folder / f'{workload.name} {one.label}'.replace(' ', '_')}")
    process = Child(1 if one.processes else one.threads, do="run", line=line, first_only=False)
    found = process.answer()
    process.close()
    for repeat, seen in enumerate(found["rounds"]):
        share = 1 - (seen["local"] + seen["method"]) / seen["round"]
        record.add("overhead", workload.name, one, repeat, "overhead", share, "share")
        for quantity in ("store", "local", "method"):
            record.add("overhead", workload.name, one, repeat, quantity, seen[quantity], "s")
    record.add("overhead", workload.name, one, 0, "peak of a run", found["peak"], "MiB")


def measure_startup(workload: Workload, repeats: int, folder: Path, record: Record) -> None:
    """Cold processes: imports alone, ``--help``, and from the start of a run to its first round."""
    alone, program = Contender("torch and hydra alone", 1), Contender("hybridfl", 1)
    line = [*workload.line(1), f"output_dir={folder / 'startup'}"]
    commands = {
        "imports": (alone, [sys.executable, "-c", "import torch, hydra"]),
        "help": (program, [sys.executable, "-m", "hybridfl", "--help"]),
    }
    for repeat in range(repeats):
        for quantity, (one, command) in commands.items():
            began = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            record.add("startup", workload.name, one, repeat, quantity, time.monotonic() - began, "s")
        spawned = time.monotonic()
        process = Child(1, do="run", line=line, first_only=True)
        found = process.answer()
        process.close()
        first = found["first"] - spawned
        record.add("startup", workload.name, program, repeat, "first round", first, "s")
        record.add("startup", workload.name, program, repeat, "loading", found["loading"], "s")
        record.add("startup", workload.name, program, repeat, "first round - loading", first - found["loading"], "s")


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A ratio of medians, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def ratio(ours: Sequence[float], theirs: Sequence[float] | None = None) -> Interval:
    """Bootstrap of the ratio of medians; repeats of the two go together. Without a second one, of the median."""
    a, b = np.array(ours), np.ones(len(ours)) if theirs is None else np.array(theirs)
    drawn = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))
    found = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))


@dataclass(frozen=True)
class Target:
    """Attributes:
    found: the ratio.
    limit: met when the lower end of the interval is not above it.
    """

    text: str
    found: Interval
    limit: float

    @property
    def met(self) -> bool:
        return self.found.low <= self.limit


def targets(record: Record) -> Iterator[Target]:
    """Those of which both sides were measured."""

    def against(workload: str, ours: str, theirs: str, limit: float) -> Iterator[Target]:
        a, b = (record.values(workload, label, "round") for label in (ours, theirs))
        if a and b:
            yield Target(f"{workload}: {ours} / {theirs}", ratio(a, b), limit)

    for executor in ("vectorized", "auto"):
        for threads in (1, 2):
            for workload, limit in (("W2", 1.5), ("W3", 1.25)):
                yield from against(workload, f"{executor} {threads}", f"by_hand {threads}", limit)
        yield from against("W3", f"{executor} 1", "plain 1", 1 / 2.4)
        yield from against("W3", f"{executor} 2", "plain 2", 1 / 4)
    for executor in ("sequential", "workers", "auto"):
        yield from against("W1", f"{executor} 1", "channels_last 1", 1.15)
    for executor in ("workers", "auto"):
        yield from against("W1", f"{executor} 2", f"{executor} 1", 1 / 1.6)
    for workload, limit in (("W1", 0.02), ("W3", 0.10)):
        for label in record.labels(workload, "overhead"):
            shares = record.values(workload, label, "overhead")
            yield Target(f"{workload}: {label}, share of a round outside local work", ratio(shares), limit)
    for label in record.labels("W4", "peak of a run"):
        if base := record.values("W2", label, "peak of a run"):
            peak = record.values("W4", label, "peak of a run")
            yield Target(f"{label}: peak memory of W4 / W2", ratio(peak, base), 1.3)
    for workload in WORKLOADS:
        first = record.values(workload, "hybridfl 1", "first round - loading")
        if first:
            alone = record.values(workload, "torch and hydra alone 1", "imports")
            yield Target(f"{workload}: first round - loading / imports alone", ratio(first, alone), 1.3)


LIMITS = ("channels_last", "by_hand")


def limit_of(record: Record, workload: str, label: str) -> str | None:
    """The limit with as many threads; worker processes and nets without such a limit have that with one."""
    threads = label.rpartition(" ")[2]
    there = record.labels(workload, "round")
    wanted = [f"{kind} {count}" for kind in LIMITS for count in (threads, "1")]
    return next((name for name in wanted if name in there), None)


def show(record: Record, workloads: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)

    def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        shown = Table(title=title, title_justify="left")
        for column in columns:
            shown.add_column(column, justify="left" if column in ("what", "contender", "workload") else "right")
        for row in rows:
            shown.add_row(*row)
        if shown.row_count:
            console.print(shown)

    for name in workloads:
        columns = ("contender", "median", "quartiles", "to the limit [95 %]", "peak MiB")
        table(f"{name}: seconds a round; contenders with their threads", columns, timed(record, name))
    columns = ("workload", "contender", "local ms", "method ms", "store ms", "outside", "peak MiB")
    table("Of a round in a whole run, medians", columns, overheads(record, workloads))
    table("Start-up, seconds", ("what", "median", "least", "most"), startups(record, workloads))
    met = [(t.text, str(t.found), f"{t.limit:.3g}", "yes" if t.met else "no") for t in targets(record)]
    table("Targets", ("what", "found [95 %]", "at most", "met"), met)


def timed(record: Record, workload: str) -> Iterator[tuple[str, ...]]:
    for label in record.labels(workload, "round"):
        seconds = record.values(workload, label, "round")
        low, high = np.quantile(seconds, [0.25, 0.75])
        limit = limit_of(record, workload, label)
        to_limit = str(ratio(seconds, record.values(workload, limit, "round"))) if limit else ""
        peak = record.values(workload, label, "peak")[0]
        yield label, f"{np.median(seconds):.4f}", f"{low:.4f} {high:.4f}", to_limit, f"{peak:.0f}"


def overheads(record: Record, workloads: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for workload in workloads:
        for label in record.labels(workload, "overhead"):
            parts = [1e3 * statistics.median(record.values(workload, label, q)) for q in ("local", "method", "store")]
            outside = 100 * statistics.median(record.values(workload, label, "overhead"))
            peak = record.values(workload, label, "peak of a run")[0]
            yield workload, label, *(f"{part:.2f}" for part in parts), f"{outside:.1f} %", f"{peak:.0f}"


def startups(record: Record, workloads: Sequence[str]) -> Iterator[tuple[str, ...]]:
    rows = (("torch and hydra alone", "imports"), *(("hybridfl", q) for q in ("help", "first round", "loading")))
    for workload in workloads:
        for who, quantity in rows:
            if seconds := record.values(workload, f"{who} 1", quantity):
                told = (statistics.median(seconds), min(seconds), max(seconds))
                yield f"{who}: {quantity}", *(f"{value:.3f}" for value in told)


def draw(record: Record, workloads: Sequence[str], file: Path) -> None:
    """Every repeat as a dot, medians as lines."""
    from matplotlib.figure import Figure

    shown = [workload for workload in workloads if record.labels(workload, "round")]
    if not shown:
        return
    height = 1 + sum(0.7 + 0.28 * len(record.labels(workload, "round")) for workload in shown)
    figure = Figure(figsize=(8, height), layout="constrained")
    heights = [len(record.labels(workload, "round")) + 2 for workload in shown]
    for axes, workload in zip(
        figure.subplots(len(shown), height_ratios=heights, squeeze=False)[:, 0], shown, strict=True
    ):
        labels = record.labels(workload, "round")
        for place, label in enumerate(labels):
            seconds = record.values(workload, label, "round")
            colour = "tab:grey" if label.rpartition(" ")[0] in REFERENCES else "tab:blue"
            axes.plot(seconds, [place] * len(seconds), "o", color=colour, alpha=0.4, markersize=4)
            axes.plot(statistics.median(seconds), place, "|", color=colour, markersize=14)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_title(workload, loc="left")
    axes.set_xlabel("seconds a round")
    figure.savefig(file, dpi=150)


def machine() -> dict[str, Any]:
    names: list[str] = []
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": cores,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


# -- references --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What is trained: for the references here, and for programs of the user's.

    Attributes:
        x: ``(N, 1, 28, 28)`` standardised images. y: ``(N,)`` labels.
        clients: positions of each client's examples.
        cohorts: ``(rounds, per_round)``, who works when.
        net: with the weights of round 0.
    """

    x: Tensor
    y: Tensor
    clients: list[np.ndarray]
    cohorts: np.ndarray
    net: nn.Module

    @classmethod
    def read(cls, file: Path, workload: Workload) -> Given:
        x, y = images(workload.train, workload.test)
        scaled = torch.from_numpy(x[: workload.train]).to(torch.float32).sub_(MEAN).div_(STD)
        found = np.load(file)
        clients = np.split(found["rows"], np.cumsum(found["sizes"])[:-1])
        perceptron = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        net = perceptron if workload.net == "mlp" else Conv((1, 28, 28), 10)
        with torch.no_grad():
            for i, tensor in enumerate(net.parameters()):
                tensor.copy_(torch.from_numpy(found[f"start {i}"]))
        return cls(scaled, torch.from_numpy(y[: workload.train]), clients, found["cohorts"], net)


class Conv(nn.Sequential):
    """Two stages of 3 × 3 convolution, ReLU and pooling, then a dense layer of 64; logits ``(b, classes)``."""

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        channels, rows, columns = input_shape
        first = nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        second = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        dense = nn.Linear(32 * (rows // 4) * (columns // 4), 64)
        super().__init__(*first, *second, nn.Flatten(), dense, nn.ReLU(), nn.Linear(64, classes))


class Reference:
    """Rounds of plain torch.

    Attributes:
        order: the shuffle of a client's ``n`` examples in a round.
    """

    def __init__(self, given: Given) -> None:
        self.given, self.net = given, copy.deepcopy(given.net)
        rng = np.random.default_rng(1)
        self.order: Callable[[int, int, int], np.ndarray] = lambda number, client, n: rng.permutation(n)

    def round(self, number: int) -> None:
        raise NotImplementedError

    def batches(self, number: int, client: int) -> Sequence[Tensor]:
        """Positions of an epoch's batches, the last one short."""
        rows = self.given.clients[client]
        return torch.from_numpy(rows[self.order(number, client, len(rows))]).split(BATCH)

    def train(self, net: nn.Module, batches: Sequence[Tensor]) -> None:
        """Stochastic gradient descent without an optimiser object, which would cost a small net half as much again."""
        params = list(net.parameters())
        for rows in batches:
            loss = F.cross_entropy(net(self.given.x[rows]), self.given.y[rows])
            grads = torch.autograd.grad(loss, params)
            with torch.no_grad():
                for tensor, grad in zip(params, grads, strict=True):
                    tensor.sub_(grad, alpha=LR)

    def weights(self) -> list[Tensor]:
        """Copies of the net's tensors."""
        return [tensor.detach().clone() for tensor in self.net.parameters()]


class Plain(Reference):
    """Federated averaging as a plain loop: load the weights into a net, train it on a client, add it to the mean."""

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.local = copy.deepcopy(given.net)

    def round(self, number: int) -> None:
        cohort = self.given.cohorts[number].tolist()
        total = sum(len(self.given.clients[client]) for client in cohort)
        mean = [torch.zeros_like(tensor) for tensor in self.net.parameters()]
        for client in cohort:
            with torch.no_grad():
                for ours, theirs in zip(self.local.parameters(), self.net.parameters(), strict=True):
                    ours.copy_(theirs)
            self.train(self.local, self.batches(number, client))
            share = len(self.given.clients[client]) / total
            for merged, tensor in zip(mean, self.local.parameters(), strict=True):
                merged.add_(tensor.detach(), alpha=share)
        with torch.no_grad():
            for tensor, merged in zip(self.net.parameters(), mean, strict=True):
                tensor.copy_(merged)


class Central(Reference):
    """One model on all batches of the cohort: what is left of a round without copies and means."""

    def round(self, number: int) -> None:
        for client in self.given.cohorts[number].tolist():
            self.train(self.net, self.batches(number, client))


class ChannelsLast(Central):
    """The same with channels last, in which a CPU convolves fastest."""

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.net = self.net.to(memory_format=torch.channels_last)


class ByHand(Reference):
    """The perceptron's step written out: no autograd, no optimiser, every product into memory that is there already."""

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.w1, self.b1, self.w2, self.b2 = (tensor.detach() for tensor in self.net.parameters())
        self.x = given.x.flatten(1)
        hidden, classes, inputs = len(self.b1), len(self.b2), self.x.shape[1]
        self.buffers = [torch.empty(BATCH, size) for size in (inputs, hidden, classes, hidden)]
        self.labels = torch.empty(BATCH, dtype=torch.int64)
        self.minus_one = torch.full((BATCH, 1), -1.0)

    def round(self, number: int) -> None:
        with torch.inference_mode():
            for client in self.given.cohorts[number].tolist():
                for rows in self.batches(number, client):
                    self.step(rows)

    def step(self, rows: Any) -> None:
        n, w1, b1, w2, b2 = len(rows), self.w1, self.b1, self.w2, self.b2
        x, hidden, logits, back = (buffer[:n] for buffer in self.buffers)
        torch.index_select(self.x, 0, rows, out=x)
        y = torch.index_select(self.given.y, 0, rows, out=self.labels[:n])
        torch.addmm(b1, x, w1.t(), out=hidden).relu_()
        torch.addmm(b2, hidden, w2.t(), out=logits)
        # The gradient of the mean cross-entropy is softmax - one-hot, over n.
        torch.softmax(logits, 1, out=logits).scatter_add_(1, y.unsqueeze(1), self.minus_one[:n])
        torch.mm(logits, w2, out=back).mul_(hidden > 0)
        rate = -LR / n
        w2.addmm_(logits.t(), hidden, alpha=rate)
        b2.add_(logits.sum(0), alpha=rate)
        w1.addmm_(back.t(), x, alpha=rate)
        b1.add_(back.sum(0), alpha=rate)


REFERENCES: dict[str, type[Reference]] = {
    "plain": Plain,
    "central": Central,
    "channels_last": ChannelsLast,
    "by_hand": ByHand,
}


# -- command line ------------------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--executors", nargs="+", help="of conf/executor; all of them without it")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="or worker processes")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rivals", nargs="+", default=[], metavar="MODULE.CLASS", help="see docs/performance.md")
    parser.add_argument("--quick", action="store_true", help="toy sizes: the numbers mean nothing")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/bench"))
    return parser.parse_args(arguments)


def study(arguments: Sequence[str] | None = None) -> None:
    chosen = parsed(arguments)
    from hybridfl.config import choices

    there = list(choices("executor"))
    executors = chosen.executors or there
    if missing := sorted(set(executors) - set(there)):
        print(f"not there: {', '.join(missing)}; there are {', '.join(there)}", file=sys.stderr)
    ours = [contender(name, t) for name in executors if name in there for t in chosen.threads]
    workloads = [WORKLOADS[name] for name in dict.fromkeys(chosen.workloads)]
    repeats = chosen.repeats
    if chosen.quick:
        workloads, repeats = [workload.small() for workload in workloads], min(repeats, 3)
    about = machine() | {"load at the start": os.getloadavg(), "quick": chosen.quick, "repeats": repeats}
    warn(about)
    record, folder = Record(), chosen.output_dir / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for workload in workloads:
            rivals = [Contender(kind, 1) for kind in chosen.rivals]
            if "rounds" in chosen.parts:
                everybody = [*ours, *references(workload, chosen.threads), *rivals]
                measure_rounds(workload, everybody, repeats, place, record)
            for one in ours if "overhead" in chosen.parts else []:
                # Of a long round a few are enough; two of them, the first and the last, do not count.
                rounds = repeats + 2 if workload.net == "mlp" else min(repeats, 5) + 2
                measure_overhead(workload, one, rounds, place, record)
        if "startup" in chosen.parts:
            started = next((workload for workload in workloads if workload.name == "W2"), workloads[0])
            measure_startup(started, 1 if chosen.quick else 5, place, record)
    about["load at the end"] = os.getloadavg()
    names = [workload.name for workload in workloads]
    with (folder / "bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(record.rows)
    (folder / "machine.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    draw(record, names, folder / "bench.png")
    show(record, names)
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
    warn(about)
    print(f"bench: {folder.resolve()}")


def warn(about: dict[str, Any]) -> None:
    load = max(about[key][0] for key in about if key.startswith("load"))
    if load > about["cores"]:
        problem = f"the load is {load:.1f} on {about['cores']} cores"
        print(f"warning: {problem}: others compute here too, and the numbers are not worth keeping", file=sys.stderr)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        for answer in answers(json.loads(sys.argv[2]), sys.stdin):
            say(answer)
    else:
        study()


if __name__ == "__main__":
    # Under its own name, by which configs find it: there must not be a second one beside it.
    from bench import main

    main()
