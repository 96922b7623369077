"""A whole ``hybridfl train``, with a clock in its engine."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from benchmark.memory import children_memory, own_peak
from benchmark.workloads import Images


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
                times = {"first": time.monotonic(), "loading": Images.seconds}
                os.write(1, f"{json.dumps(times)}\n".encode())
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

        Engine.step = timed  # type: ignore[method-assign, assignment]

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
        def timed(state: Any, now: Any) -> Generator[Any, Any, Any]:
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
