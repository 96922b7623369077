"""Every contender in a process of its own, which answers lines of JSON."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmark.contenders import Hybridfl, Runner, write_given
from benchmark.convolutions import Convolutions
from benchmark.memory import children_memory, own_peak
from benchmark.references import REFERENCES, Given
from benchmark.stopping import deferred
from benchmark.whole_run import whole_run
from benchmark.workloads import Workload

SCRIPT = Path(__file__).resolve().parents[1] / "bench.py"


class Child:
    """A process of this script that answers lines of JSON."""

    alive: ClassVar[set[Child]] = set()

    def __init__(self, cores: int, **job: Any) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
        self.what = job.get("contender", job["do"])
        with deferred():
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--child", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,  # so that Ctrl-C is for us alone, and those below it can be ended with it
            )
            self.alive.add(self)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench: {self.what} ended with status {self.process.wait()}; its error is above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def asked(self, question: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and so have its answers
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # of a question that nobody has read
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.alive.discard(self)

    @classmethod
    def end_all(cls) -> None:
        """Those that a run which was stopped has left, and all below them."""
        for child in list(cls.alive):
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.close()


def answers(job: dict[str, Any], questions: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The other side: what was prepared, then a round for every question."""
    if job["do"] == "given":
        write_given(Hybridfl(job["line"]), job["rounds"], Path(job["file"]))
        yield {}
    elif job["do"] == "run":
        yield whole_run(job["line"], job["first_only"])
    elif job["do"] == "convolutions":
        torch.set_num_threads(job["threads"])
        ways = Convolutions(Workload(**job["workload"] | {"shape": tuple(job["workload"]["shape"])}))
        ways.timed(0)  # which is not counted
        yield {}
        for number, _ in enumerate(questions):
            yield ways.timed(number)
    else:
        runner, number = made(job), 0
        yield {}
        for question in questions:
            if question.strip() == "memory":
                yield {"peak": own_peak() + children_memory()}
                continue
            began = time.perf_counter()
            runner.round(number)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            yield {"seconds": time.perf_counter() - began}
            number += 1


def serve(job: str) -> None:
    """What such a process does, with its job as JSON."""
    for answer in answers(json.loads(job), sys.stdin):
        say(answer)


def say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def made(job: dict[str, Any]) -> Runner:
    if job["line"]:
        return Hybridfl(job["line"])
    torch.set_num_threads(job["threads"])
    given = Given.read(Path(job["file"]), Workload(**job["workload"] | {"shape": tuple(job["workload"]["shape"])}))
    if job["kind"] in REFERENCES:
        return REFERENCES[job["kind"]](given)
    module, _, name = job["kind"].rpartition(".")
    rival: Runner = getattr(importlib.import_module(module), name)(given)
    return rival
