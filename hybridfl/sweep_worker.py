"""A worker process of a sweep: one job after the other, with the data sets that it has read kept between them."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from hybridfl.plan import DataCache
from hybridfl.progress import NoProgress
from hybridfl.sweep_jobs import Job, Outcome, work

QUIET_SECONDS = 0.2
"""Between two reports of rounds."""


def serve(connection: Connection, environment: Mapping[str, str]) -> None:
    """Do the jobs that come through the connection until it is closed; tell how they go and how they end.

    SIGTERM, and the end of the process at the other side, stop a job like Ctrl-C, once: its checkpoint is written in peace.
    """
    os.environ.update(environment)
    line = _Line(connection)
    # In a terminal Ctrl-C reaches all processes; the sweep passes it on as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, line.stop)
    cache = DataCache()
    with suppress(KeyboardInterrupt):
        while (job := line.next()) is not None:
            line.tell("ended", _outcome(job, cache, line))


def _outcome(job: Job, cache: DataCache, line: _Line) -> Outcome:
    try:
        return work(job, cache, Reporter(line))
    except KeyboardInterrupt:
        return Outcome("pending", job.digest)


class _Line:
    """The connection to the sweep."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._working = self._telling = self._stopped = self._held_back = False
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self) -> Job | None:
        """The next job; None when there will be none."""
        self._working = False
        if self._stopped:
            return None
        job = self._jobs.get()
        self._working = job is not None
        return job

    def tell(self, word: str, *content: Any) -> None:
        """A message; a stop waits until it is told, as half of one could not be read."""
        self._telling = True
        try:
            with suppress(OSError):  # nobody is there any more, which is a stop too
                self._connection.send((word, *content))
        finally:
            self._telling = False
        if self._held_back:
            self._held_back = False
            raise KeyboardInterrupt

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """Handles SIGTERM."""
        if self._stopped:
            return
        self._stopped = True
        if self._telling:
            self._held_back = True
        else:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        try:
            while True:
                self._jobs.put(self._connection.recv())
        except (EOFError, OSError):
            self._jobs.put(None)
            if self._working:
                os.kill(os.getpid(), signal.SIGTERM)


class Reporter(NoProgress):
    """Tells the sweep how a run goes."""

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._rounds, self._told = 0, 0.0

    def start(self, title: str, rounds: int, done: int, about: str = "") -> None:
        self._rounds = rounds
        self._line.tell("start", title, rounds, done, about)

    def round(self, done: int, accuracy: float | None, bytes_moved: int) -> None:
        now = time.monotonic()
        if done == self._rounds or now - self._told >= QUIET_SECONDS:
            self._told = now
            self._line.tell("round", done, accuracy, bytes_moved)

    def note(self, text: str) -> None:
        self._line.tell("note", text)

    def finish(self, text: str) -> None:
        self._line.tell("finish", text)
