"""Jobs of a sweep as submitit starts them: processes on this machine, or jobs of Slurm."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from hybridfl.launchers import SubmititLocal, SubmititSlurm
from hybridfl.runs import read_run
from hybridfl.sweep_jobs import Board, Job, Outcome, Queue, cores_of, with_cores

LOOK_SECONDS = 0.2
"""How often jobs are looked at."""
TAIL = 8192
"""Bytes of a table in which its last evaluation is looked for."""
REPORT_SECONDS = 2.0
"""How often their runs are asked how far they are."""
GRACE_SECONDS = 60.0
"""That stopped jobs have to write their checkpoints."""


class Task:
    """What is sent to the other process; submitit calls it there.

    Args:
        owner: the process on this machine without which it stops; None for one that goes on alone.
    """

    def __init__(self, job: Job, owner: int | None) -> None:
        self.job, self.owner = job, owner
        self.folder, self.path = os.getcwd(), list(sys.path)

    def __call__(self) -> tuple[str, str, str]:
        """The fields of an outcome: plain texts, so that any version of the package can read them."""
        os.chdir(self.folder)
        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        from hybridfl.plan import DataCache
        from hybridfl.progress import PlainProgress
        from hybridfl.sweep_jobs import work

        signal.signal(signal.SIGTERM, _interrupted)
        if self.owner is not None:
            threading.Thread(target=_watch, args=(self.owner,), daemon=True).start()
        try:
            outcome = work(self.job, DataCache(), PlainProgress())
        except KeyboardInterrupt:
            outcome = Outcome("pending", self.job.digest)
        return outcome.status, outcome.run, outcome.error

    def checkpoint(self) -> Any:
        """Called by submitit when the time is nearly up: queued again, the run goes on from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _interrupted(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the checkpoint is written in peace
    limit = threading.Timer(GRACE_SECONDS, os._exit, [1])
    limit.daemon = True
    limit.start()
    raise KeyboardInterrupt


def _watch(owner: int) -> None:
    """Stop this process when the one that wanted its work has gone."""
    while True:
        time.sleep(1)
        try:
            os.kill(owner, 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        except PermissionError:  # there, and another user's by now
            continue


class Submitted:
    """At most ``number`` jobs at a time, each a process by itself.

    Args:
        folder: for submitit's files and the jobs' logs.
        number: jobs under way at a time.
        gpus: of this machine.
    """

    def __init__(self, options: SubmititLocal, folder: Path, number: int, gpus: int = 0) -> None:
        self.options, self.folder, self.number = options, folder, number
        self.is_local = not isinstance(options, SubmititSlurm)
        self._devices = [*range(gpus)] if self.is_local else []
        self._running: dict[int, tuple[Job, Any]] = {}
        self._looked = 0.0

    def work(self, jobs: Queue, board: Board) -> None:
        """Do all jobs.

        Raises:
            KeyboardInterrupt: it was stopped; so have been the jobs, after their checkpoints.
        """
        try:
            while self._hand_out(jobs, board):
                time.sleep(LOOK_SECONDS)
                self._collect(jobs, board)
        except BaseException:
            self._stop(board)
            raise
        if jobs.stopped:
            self._stop(board)

    def _hand_out(self, jobs: Queue, board: Board) -> bool:
        while len(self._running) < self.number and not jobs.stopped and (job := jobs.take()) is not None:
            slot = next(slot for slot in range(self.number) if slot not in self._running)
            board.begin(slot, job)
            submitted = self._submit(job, slot)
            self._running[slot] = job, submitted
            about = f"submitit's job {submitted.job_id}, log {submitted.paths.stdout}"
            board.progress(slot).start(job.title, job.composed.config["rounds"], 0, about)
        return bool(self._running) and not jobs.stopped

    def _submit(self, job: Job, slot: int) -> Any:
        import submitit

        cores = self.options.cpus_per_task or cores_of(job.composed)
        task = Task(Job(job.place, with_cores(job.composed, cores), job.digest), os.getpid() if self.is_local else None)
        executor = (submitit.LocalExecutor if self.is_local else submitit.SlurmExecutor)(
            self.folder, max_num_timeout=getattr(self.options, "max_num_timeout", 0)
        )
        executor.update_parameters(**self._parameters(cores, slot))
        with _without_interrupts():  # which the processes inherit: they are stopped by SIGTERM
            return executor.submit(task)

    def _parameters(self, cores: int, slot: int) -> dict[str, Any]:
        options = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self.options).items()
            if value not in (None, (), {}) and name != "max_num_timeout"
        }
        if not self.is_local:
            options["time"] = options.pop("timeout_min")
            options["job_name"] = options.pop("name")
            options["cpus_per_task"] = cores
            if "mem_gb" in options:
                options["mem"] = f"{options.pop('mem_gb'):g}GB"
            # One job is submitted at a time, so how many there are is seen to here.
            del options["array_parallelism"]
            return options
        gpus = self.options.gpus_per_node
        gpus = min(1, len(self._devices)) if gpus is None else gpus
        first = slot * gpus
        visible = [self._devices[(first + k) % len(self._devices)] for k in range(gpus)] if self._devices else []
        kept = ("timeout_min", "stderr_to_stdout", "setup")
        found = {name: value for name, value in options.items() if name in kept}
        return found | {"gpus_per_node": len(visible), "visible_gpus": tuple(visible)}

    def _collect(self, jobs: Queue, board: Board) -> None:
        now = time.monotonic()
        if look := now - self._looked > REPORT_SECONDS:
            self._looked = now
        for slot, (job, submitted) in list(self._running.items()):
            if look and (found := last_round(Path(job.composed.config["output_dir"]) / "runs" / job.digest)):
                board.progress(slot).round(*found)
            if submitted.done():
                del self._running[slot]
                outcome = self._outcome(job, submitted)
                jobs.finish(job, outcome)  # stored first: what was said must hold after an interrupt
                if outcome.status == "done":
                    folder = Path(job.composed.config["output_dir"]) / "runs" / outcome.run
                    board.progress(slot).finish(f"done: {read_run(folder).summary()}")
                board.end(slot, job, outcome)

    def _outcome(self, job: Job, submitted: Any) -> Outcome:
        logs = f"its log is {submitted.paths.stderr}"
        # submitit waits for a result that may be slow to appear on a disk of several machines.
        submitted._results_timeout_s = 1 if self.is_local else 15
        try:
            return Outcome(*submitted.result())
        except Exception as error:
            told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            kind = "its process ended without a result" if "not produced any output" in str(error) else told
            return Outcome("failed", job.digest, f"{kind}; {logs}")

    def _stop(self, board: Board) -> None:
        """SIGTERM, which a job answers with its checkpoint; Slurm sends it for ``scancel``."""
        if not self.is_local:
            for _, submitted in self._running.values():
                submitted.cancel(check=False)
            return
        last = time.monotonic() + GRACE_SECONDS + 5
        while (left := [job for _, job in self._running.values() if not job.done()]) and time.monotonic() < last:
            for submitted in left:  # again and again: one that is just starting does not listen yet
                submitted._process.send_signal(signal.SIGTERM)  # to the process that watches over the job's
            time.sleep(LOOK_SECONDS)
        if left:
            board.note(f"{len(left)} jobs did not stop within {GRACE_SECONDS:g} s.")


def last_round(folder: Path) -> tuple[int, float | None, int] | None:
    """Round, accuracy and bytes sent of a run's last evaluation, from the end of its table; None before the first."""
    try:
        with open(folder / "metrics.csv", "rb") as file:
            header = file.readline().decode().strip().split(",")
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except OSError:
        return None
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines if line.count(",") == len(header) - 1]
    scopes = [row for row in rows if row["scope"] in ("global", "clients")]
    last = [row for row in scopes if row["round"] == scopes[-1]["round"]]
    if not last:
        return None
    row = min(last, key=lambda row: row["scope"] != "global")
    moved = sum(int(float(row[name] or 0)) for name in ("bytes_up", "bytes_down", "bytes_peer"))
    return int(row["round"]), float(row["accuracy"]) if row["accuracy"] else None, moved


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started within do not hear Ctrl-C; this one hears it when the block ends, rather than never."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
