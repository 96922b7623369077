"""Loss rules and probes for tests of executors, in a module that a process started by one can import.

Those that do harm are told by ``ctx``: ``harm`` which one, ``who`` (client) and ``flag``, a file. It happens while the file
is not there, and ``once`` makes the file first.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridfl.local import cross_entropy
from hybridfl.methods.fedavg import FedAvg
from hybridfl.params import Params
from hybridfl.types import Apply, Batch, Job, ProbeInput, Results, Round, State


class Unpicklable(Exception):
    """Two arguments, of which pickle knows one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def harmful(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """Cross-entropy, unless harm is to be done."""
    flag = Path(ctx["flag"])
    if ctx["harm"] and not flag.exists():
        if ctx.get("once"):
            flag.touch()
        do(ctx["harm"])
    return cross_entropy(apply, theta, params, batch, ctx)


def do(harm: str) -> None:
    if harm.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[harm])
    elif harm == "exit":
        os._exit(3)
    elif harm == "sleep":
        time.sleep(1000)
    elif harm == "loop":
        while True:
            pass
    elif harm == "template":
        os.kill(os.getppid(), signal.SIGKILL)
    elif harm == "stop":
        raise SystemExit(5)
    elif harm == "unpicklable":
        raise Unpicklable("cannot", "travel")
    elif harm != "nothing":
        raise ValueError(f"broken by {harm}")


def writing(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """Adds to its own ctx, as a rule should not."""
    ctx["tensor"].add_(1)
    return cross_entropy(apply, theta, params, batch, ctx)


def threads(seen: ProbeInput) -> Tensor:
    return torch.tensor(torch.get_num_threads())


def process(seen: ProbeInput) -> Tensor:
    return torch.tensor(os.getpid())


def page_faults(seen: ProbeInput) -> Tensor:
    """How often memory is asked for anew, in 4 KiB, while the same 24 MiB are used ten times."""
    counts = []
    for _ in range(10):
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        for piece in [torch.empty(2**20) for _ in range(6)]:
            piece.fill_(1)
        del piece
    return torch.tensor(counts[-1] - counts[4])


def of_any_kind(seen: ProbeInput) -> dict[str, Any]:
    """Numbers, texts, and tensors of many kinds, some of them twice and some with the memory of others."""
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    theta = next(iter(seen.theta.values()))
    return {
        "nested": [{"a": base, "again": base}, (base.t(), base[1:3, ::2], base[0, 5])],
        "kinds": [base.to(kind) for kind in (torch.bfloat16, torch.bool, torch.int8, torch.complex64)],
        "special": [torch.zeros(0, 3), torch.tensor(7), torch.ones(1).expand(3, 2), base.to_sparse(), base.mH],
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "plain": [1, 2.5, "text", None, True],
        "own": [theta, theta[:1]],
        "given": seen.ctx["tensor"],
    }


class Deadly(FedAvg):
    """FedAvg whose clients do in round 2 the harm that a file ``deadly`` names, if there is one."""

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        deadly = Path("deadly")
        harm = deadly.read_text() if now.index == 2 and deadly.exists() else ""
        ctx = {"harm": harm, "flag": "harmless"}
        results = yield [Job(client, state["global"], loss=harmful, ctx=ctx) for client in now.clients]
        return {"global": results.mean("examples")}
