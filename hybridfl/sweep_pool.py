"""Worker processes that share the jobs of a sweep on this machine.

A pool of joblib's own, loky, is of no use here: it gives up every job when one process dies, and ends processes without letting
them write what they have.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from hybridfl.progress import Progress
from hybridfl.sweep_jobs import Board, Job, Outcome, Queue, with_cores
from hybridfl.sweep_worker import serve

GRACE_SECONDS = 60.0
"""That stopped workers have to write their checkpoints."""
LOOK_SECONDS = 1.0
"""How often a pool with idle workers asks for jobs."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Pool:
    """At most ``number`` processes, each of which does one job at a time.

    Args:
        cores: of this machine that each of them may use.
        devices: names of the GPUs, as in CUDA_VISIBLE_DEVICES, over which they are dealt.
    """

    def __init__(self, number: int, cores: int, devices: Sequence[str] = ()) -> None:
        self.number, self.cores, self.devices = number, cores, devices
        self._workers: dict[int, _Worker] = {}

    def work(self, jobs: Queue, board: Board) -> None:
        """Do all jobs.

        Raises:
            KeyboardInterrupt: it was stopped; so have been the workers, after their checkpoints.
        """
        try:
            while self._hand_out(jobs, board):
                self._listen(jobs, board)
        except BaseException:
            self._stop(board)
            raise
        self._stop(board) if jobs.stopped else self._close()

    def _hand_out(self, jobs: Queue, board: Board) -> bool:
        """Whether anybody has work."""
        if jobs.stopped:
            return False
        for slot in range(self.number):
            worker = self._workers.get(slot)
            if worker and worker.job:
                continue
            job = jobs.take()
            if job is None:
                break
            if worker is None:
                worker = self._workers[slot] = _Worker(self._environment(slot))
            board.begin(slot, job)
            worker.begin(job, self.cores, board.progress(slot))
        return any(worker.job for worker in self._workers.values())

    def _listen(self, jobs: Queue, board: Board) -> None:
        ready = wait([worker.connection for worker in self._workers.values()], LOOK_SECONDS)
        for slot, worker in list(self._workers.items()):
            if worker.connection not in ready:
                continue
            job = worker.job
            outcome = worker.heard()
            if worker.ended:
                del self._workers[slot]
            if outcome and job:
                jobs.finish(job, outcome)  # stored first: what was said must hold after an interrupt
                board.end(slot, job, outcome)

    def _environment(self, slot: int) -> Mapping[str, str]:
        return {"CUDA_VISIBLE_DEVICES": self.devices[slot % len(self.devices)]} if self.devices else {}

    def _stop(self, board: Board) -> None:
        """End them all, after their checkpoints unless that takes too long or a second Ctrl-C comes."""
        try:
            for worker in self._workers.values():
                worker.terminate()
            last = time.monotonic() + GRACE_SECONDS
            while self._workers and time.monotonic() < last:
                wait([worker.connection for worker in self._workers.values()], last - time.monotonic())
                for slot, worker in list(self._workers.items()):
                    if worker.connection.poll():
                        worker.heard()
                    if worker.ended:
                        del self._workers[slot]
            if self._workers:
                board.note(f"{len(self._workers)} workers did not stop within {GRACE_SECONDS:g} s and are ended.")
        finally:
            for worker in self._workers.values():
                worker.kill()
            self._workers.clear()

    def _close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


class _Worker:
    """A process, and the job that it has."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.job: Job | None = None
        self.ended = False
        self._progress: Progress | None = None
        self.connection, theirs = multiprocessing.Pipe()
        self.process = _start(theirs, environment)
        theirs.close()

    def begin(self, job: Job, cores: int, progress: Progress) -> None:
        self.job, self._progress = job, progress
        with suppress(OSError):  # it has died, which is noticed when it is listened to
            self.connection.send(Job(job.place, with_cores(job.composed, cores), job.digest))

    def heard(self) -> Outcome | None:
        """Take one message; how the job ended if that is what it says, or if the process is dead."""
        job = self.job
        try:
            word, *content = self.connection.recv()
        except (EOFError, OSError):
            self.ended = True
            self.process.join()
            self.connection.close()
            self.job = None
            return Outcome("failed", job.digest, f"its worker process {_end(self.process.exitcode)}.") if job else None
        if word == "ended":
            self.job = None
            outcome: Outcome = content[0]
            return outcome
        self._show(word, content)
        return None

    def _show(self, word: str, content: list[Any]) -> None:
        assert self._progress is not None
        getattr(self._progress, word)(*content)

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def close(self) -> None:
        """End it while it has no job."""
        self.connection.close()
        self.process.join()


def _start(connection: Connection, environment: Mapping[str, str]) -> ForkServerProcess:
    """A process that torch need not be imported for: it is forked from one that has done so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hybridfl.sweep_worker"])
    before = {name: os.environ.get(name) for name in THREADS}
    # Read when the libraries are imported. An operation of torch has the threads that the executor says.
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        process = context.Process(target=serve, args=(connection, environment), daemon=False)
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return process


def _end(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    hint = "; is there too little memory?" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"
