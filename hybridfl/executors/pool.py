"""The program's side of worker processes: started when needed, handed tasks, replaced when they fail."""

from __future__ import annotations

import atexit
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from hybridfl.errors import HybridflError
from hybridfl.executors.messages import Gone, Kind, received, send
from hybridfl.executors.parcel import Opened, Parcel
from hybridfl.local import Outcome, Task, Workbench
from hybridfl.types import SERVER

TRIES = 2
"""Processes that may die or hang over a task before the run is given up."""
PATIENCE = 20
"""How often busy workers are looked at before one counts as hanging."""


class _Template:
    """The process that workers are forked from, see :mod:`hybridfl.executors.template`."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.control, theirs = socket.socketpair()
        # Found where this process finds it; and threads of libraries, once started, do not survive a fork.
        code = f"import sys; sys.path[:] = {sys.path!r}; from hybridfl.executors.template import main; "
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"{code}main({fd})"],
                stdin=subprocess.DEVNULL,
                env=os.environ | threads,
                pass_fds=[fd],
            )

    @property
    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def fork(self) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                return Worker(ours, self._asked(Kind.FORK, fd=theirs.fileno()), self)
            except BaseException:
                ours.close()
                raise

    def end_of(self, pid: int) -> int:
        """How a worker that has ended did: its status, or the negative number of a signal."""
        return self._asked(Kind.REAP, pid)

    def _asked(self, kind: Kind, number: int = 0, fd: int | None = None) -> int:
        try:
            send(self.control, kind, number, fd)
            with received(self.control) as (_, answer, _):
                return answer
        except Gone as error:
            problem = "the process that starts workers has ended; try again, or take executor=sequential."
            raise HybridflError(problem) from error
        except BaseException:
            self.close()  # its answer, when it comes, would be taken for that to the next question
            raise

    def close(self) -> None:
        if self.owner == os.getpid():
            self.control.close()
            self.process.wait()


_template: _Template | None = None


def template() -> _Template:
    """The one of this process, started at the first call; it lives as long as this process and serves all its runs."""
    global _template
    if _template is None or not _template.alive:
        _template = _Template()
        atexit.register(_template.close)
    return _template


@dataclass(eq=False)
class Worker:
    """A process that does one task at a time.

    Attributes:
        has: parcels that it has been sent.
        task: the one under way.
        seconds: of processor time when it was last looked at; ``quiet``: how often in a row they were the same.
    """

    socket: socket.socket
    pid: int
    parent: _Template
    has: dict[Kind, Parcel] = field(default_factory=dict)
    task: int | None = None
    seconds: float | None = None
    quiet: int = 0

    def begin(self, task: int, parcels: Mapping[Kind, Parcel]) -> None:
        """Hand out a task, and what it needs if the worker has it not yet."""
        self.task, self.seconds, self.quiet = task, None, 0
        for kind, parcel in parcels.items():
            if self.has.get(kind) is not parcel:
                send(self.socket, kind, fd=parcel.fd)
                self.has[kind] = parcel
        send(self.socket, Kind.WORK, task)

    def forget(self) -> None:
        """Tasks are over and done with."""
        if self.has.pop(Kind.TASKS, None):
            with suppress(Gone):  # which is noticed when there is work again
                send(self.socket, Kind.FORGET)

    def look(self) -> None:
        """Notice whether it gets on: waiting for ever, and being stopped, take no processor time."""
        # Linux: the clock of another process's processor time, as clock_getcpuclockid makes it.
        try:
            seconds = time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return
        self.quiet = self.quiet + 1 if seconds == self.seconds else 0
        self.seconds = seconds

    def end(self) -> str:
        """End it, in whatever state it is; what it died of before, if it did."""
        self.socket.close()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        try:
            status = self.parent.end_of(self.pid)
        except HybridflError:
            return "ended"
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


@dataclass(frozen=True)
class Failure:
    """An error that a task raised, and the worker's traceback."""

    error: BaseException
    text: str


class RemoteTraceback(Exception):
    """The traceback in the process where an error was raised, as its cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(eq=False)
class Pool:
    """At most so many workers.

    Attributes:
        hang_seconds: without processor time after which a busy worker is replaced; ``None`` waits.
    """

    number: int
    hang_seconds: float | None
    workers: list[Worker] = field(default_factory=list)
    bench: Workbench | None = None
    parcels: dict[Kind, Parcel] = field(default_factory=dict)
    widths: tuple[float, ...] = ()

    def run(self, bench: Workbench, tasks: Sequence[Task], meanwhile: Callable[[], None]) -> list[Outcome]:
        """The tasks' outcomes in their order.

        Args:
            meanwhile: what this process does once the workers have something to do.

        Raises:
            HybridflError: a task ended two processes.
            ConfigError: key ``executor``: what a task needs cannot be sent to another process.
        """
        if not all(worker.parent.alive for worker in self.workers):
            self.close()  # nobody would end them if this process were killed
        self._share(bench)
        self.parcels[Kind.TASKS] = parcel = Parcel(tasks)
        try:
            found = _Round(self, tasks, parcel).work(meanwhile)
        except BaseException:
            self.close()
            raise
        finally:
            for worker in self.workers:
                worker.forget()
            self.parcels.pop(Kind.TASKS, None)
            parcel.close()
        failures = [found[i] for i in sorted(found) if isinstance(found[i], Failure)]
        if failures:
            failure = failures[0]
            assert isinstance(failure, Failure)
            raise failure.error from RemoteTraceback(failure.text)
        return [outcome for i in range(len(tasks)) if isinstance(outcome := found[i], Outcome)]

    def close(self) -> None:
        """End the workers; with new work there will be others."""
        for worker in self.workers:
            worker.end()
        self.workers.clear()
        self.parcels.clear()
        self.bench = None

    def __del__(self) -> None:
        # One that nobody closed, such as that of an engine in a notebook.
        with suppress(Exception):
            self.close()

    def _share(self, bench: Workbench) -> None:
        """Put the nets and the pool of examples where workers find them."""
        if bench is not self.bench:
            self.parcels[Kind.POOL] = parcel = Parcel([(bench.x, bench.y)])
            # From now on this process, too, has its examples there, and the memory they were in is free.
            for tensor, shared in zip((bench.x, bench.y), Opened(parcel.fd, written=True).item(0), strict=True):
                tensor.set_(shared)
        widths = tuple(bench.other_widths)
        if bench is not self.bench or widths != self.widths:
            nets = bench.net, dict(bench.other_widths), bench.chunk
            self.parcels[Kind.NETS] = Parcel([(sys.path, os.getcwd()), nets])
        self.bench, self.widths = bench, widths


class _Round:
    """Tasks being worked on, the longest first: a long one at the end would be waited for."""

    def __init__(self, pool: Pool, tasks: Sequence[Task], parcel: Parcel) -> None:
        self.pool, self.tasks, self.parcel = pool, tasks, parcel
        self.waiting = sorted(range(len(tasks)), key=lambda i: _size(tasks[i]))
        self.tries: Counter[int] = Counter()
        self.found: dict[int, Outcome | Failure] = {}

    def work(self, meanwhile: Callable[[], None]) -> dict[int, Outcome | Failure]:
        with selectors.DefaultSelector() as self.selector:
            for worker in self.pool.workers:
                self.selector.register(worker.socket, selectors.EVENT_READ, worker)
            self._hand_out()
            meanwhile()
            while any(worker.task is not None for worker in self.pool.workers):
                self._wait()
                self._hand_out()
        return self.found

    def _hand_out(self) -> None:
        while self.waiting:
            worker = next((w for w in self.pool.workers if w.task is None), None)
            if worker is None and len(self.pool.workers) == self.pool.number:
                return
            self._begin(worker or self._fresh(), self.waiting.pop())

    def _fresh(self) -> Worker:
        worker = template().fork()
        self.pool.workers.append(worker)
        self.selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _begin(self, worker: Worker, task: int) -> None:
        try:
            worker.begin(task, self.pool.parcels)
        except Gone:
            self._lost(worker)

    def _wait(self) -> None:
        limit = self.pool.hang_seconds
        ready = self.selector.select(None if limit is None else limit / PATIENCE)
        for key, _ in ready:
            try:
                self._take(key.data)
            except Gone:
                self._lost(key.data)
        if not ready:
            for worker in [w for w in self.pool.workers if w.task is not None]:
                worker.look()
                if worker.quiet >= PATIENCE:
                    self._lost(worker, f"used no processor time for {limit:g} s and was ended")

    def _take(self, worker: Worker) -> None:
        """What a worker found."""
        with received(worker.socket) as (kind, number, fd):
            opened = Opened(fd, self.parcel.tensors, copied=True)
            worker.task = None
            if kind == Kind.FAILED:
                self.found[number] = Failure(*opened.items())
                # The first task in order that fails is the one to tell of, as if they had been done in order.
                self.waiting = [i for i in self.waiting if i < number]
            else:
                outcome: Outcome = opened.item(0)
                result = replace(outcome.result, start=self.tasks[number].job.start)
                self.found[number] = replace(outcome, result=result)

    def _lost(self, worker: Worker, how: str = "") -> None:
        """A worker has ended, or is to be. A task that it had goes to a fresh one: others may have ended unseen."""
        self.selector.unregister(worker.socket)
        self.pool.workers.remove(worker)
        died = worker.end()
        if worker.task is None:
            return
        task = self.tasks[worker.task]
        who = "the server" if task.job.participant == SERVER else f"client {task.job.participant}"
        told = f"the worker process of {who} in round {task.round + 1} {how or died}"
        self.tries[worker.task] += 1
        if self.tries[worker.task] == TRIES:
            hint = "; is there too little memory?" if "SIGKILL" in died and not how else ""
            raise HybridflError(f"{told}, and the one before it did not get through either{hint or '.'}")
        print(f"hybridfl: {told}; its work is done again.", file=sys.stderr, flush=True)
        self._begin(self._fresh(), worker.task)


def _size(task: Task) -> int:
    """Examples that go through the net, about."""
    examples = task.examples
    return 3 * task.steps * min(task.work.batch_size, examples) + len(task.job.probes) * examples
