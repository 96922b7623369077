"""Ranks of one run as processes on this machine, and a method that misbehaves in them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from cli_helpers import PRELOADED, TINY

from hybridfl.cli import main
from hybridfl.executors.ranks import Ranks
from hybridfl.group import Group
from hybridfl.world import World

FEDAVG = tuple(text for text in TINY if not text.startswith("merging."))

ODD = """
import os, time
from dataclasses import replace
import torch
from hybridfl.local import cross_entropy
from hybridfl.methods.fedavg import FedAvg
from hybridfl.types import Model

RANK = int(os.environ.get("RANK", 0))

def faulty(apply, theta, params, batch, ctx):
    if "WORLD_SIZE" in os.environ:
        raise ArithmeticError("out of luck")
    return cross_entropy(apply, theta, params, batch, ctx)

class Odd(FedAvg):
    \"\"\"FedAvg that does something else on rank 1 in the third round.\"\"\"

    def __init__(self, how: str = "drift"):
        self.how = how

    def round(self, state, now):
        here = RANK == 1 and now.index == 2
        inside = super().round(state, now)
        jobs = next(inside)
        if self.how == "task" and now.index == 2:
            jobs = [replace(job, loss=faulty) if job.participant == max(now.clients) else job for job in jobs]
        if self.how == "jobs" and here:
            jobs = jobs[:1]
        if self.how == "method" and here:
            raise ValueError("no idea")
        if self.how == "sleep" and here:
            open("asleep", "w").close()
            time.sleep(60)
        results = yield jobs
        try:
            inside.send(results)
        except StopIteration as stop:
            state = stop.value
        if self.how == "drift" and RANK:
            model = state["global"]
            last = {n: torch.nextafter(t, torch.full_like(t, RANK)) for n, t in model.params.items()}
            state = state | {"global": Model(last, model.buffers)}
        return state
"""


@dataclass
class Launched:
    """Ranks under way, in processes forked from one that has imported torch already."""

    cwd: Path
    ranks: list[ForkServerProcess]

    def join(self, seconds: float = 60) -> list[int | None]:
        """The exit statuses; whoever is left after this time is killed, and the test fails."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in self.ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, [self.said(rank) for rank in range(len(self.ranks))]
        return [process.exitcode for process in self.ranks]

    def said(self, rank: int) -> str:
        file = self.cwd / f"said-{self.ranks[rank].pid}.txt"
        return file.read_text() if file.exists() else ""

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def until(self, file: str) -> None:
        """Waits for a file below the folder, but not for ranks that have ended."""
        deadline = time.monotonic() + 60
        while not list(self.cwd.glob(file)):
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in self.ranks), [self.said(0), self.said(1)]
            time.sleep(0.005)


def _child(cwd: str, lines: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> None:
    os.chdir(cwd)
    output = os.open(f"said-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 0
    for line, environment in zip(lines, environments, strict=True):
        os.environ.update(environment)
        status = status or main(list(line))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def free_ports(number: int) -> list[str]:
    with contextlib.ExitStack() as all_of_them:
        sockets = [all_of_them.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


def launch(cwd: Path, *arguments: str, ranks: int = 2, own: Sequence[Sequence[str]] = ()) -> Launched:
    """``hybridfl ARGUMENTS`` in so many ranks; ``own`` are further arguments of each."""
    return launch_lines(cwd, [[[*arguments, *(own[rank] if own else ())]] for rank in range(ranks)])


def launch_lines(cwd: Path, lines: Sequence[Sequence[Sequence[str]]]) -> Launched:
    """One rank for each list of lines, which does one of them after the other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ports = free_ports(len(lines[0]))
    processes = []
    for rank, mine in enumerate(lines):
        here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(lines)), "MASTER_ADDR": "127.0.0.1"}
        environments = [here | {"MASTER_PORT": port} for port in ports]
        process = context.Process(target=_child, args=(str(cwd), mine, environments))
        process.start()
        processes.append(process)
    return Launched(cwd, processes)


def done_in_ranks(cwd: Path, *arguments: str, ranks: int = 2) -> Path:
    """The folder of a run that must succeed, of which only rank 0 speaks."""
    launched = launch(cwd, "train", *arguments, "executor=ranks", ranks=ranks)
    assert launched.join() == [0] * ranks, [launched.said(rank) for rank in range(ranks)]
    assert [launched.said(rank) for rank in range(1, ranks)] == [""] * (ranks - 1)
    return Path(launched.said(0).splitlines()[-1].removeprefix("run: "))


def odd(how: str) -> list[str]:
    """Overrides of a run with a method that is odd."""
    Path("odd.py").write_text(ODD)
    Path("conf/baseline").mkdir(parents=True, exist_ok=True)
    Path("conf/baseline/odd.yaml").write_text("# Odd\n_target_: odd.Odd\nhow: drift\n")
    return ["--config-dir", "conf", *FEDAVG, "baseline=odd", f"baseline.how={how}", "clients.per_round=4"]


class Pair:
    """Two ranks that stay, and do one run after the other together."""

    def __enter__(self) -> Pair:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        (port,), self.pipes, self.processes = free_ports(1), [], []
        for rank in range(2):
            own, far = context.Pipe()
            world = World(rank, 2, rank, "127.0.0.1", int(port))
            self.processes.append(context.Process(target=_rank, args=(far, world)))
            self.processes[-1].start()
            far.close()
            self.pipes.append(own)
        return self

    def ends(self, line: tuple[str, ...]) -> list[Any]:
        """What each of them has at the end of a run."""
        for pipe in self.pipes:
            pipe.send(line)
        return [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes]

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(30)
            process.kill()


def _rank(pipe: Connection, world: World) -> None:
    from parity_helpers import end

    executor = Ranks()
    executor.join(Group(world), torch.device("cpu"), "gloo")
    with contextlib.suppress(EOFError):  # the tests are over
        while True:
            line = pipe.recv()
            try:
                found = end(line, executor)
            except Exception:
                found = traceback.format_exc()
            pipe.send_bytes(pickle.dumps(found))
    os._exit(0)
