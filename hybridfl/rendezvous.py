"""Where the ranks of one run meet: a store of small texts (torch's ``TCPStore``), and the signs of life left there.

A rank waits for the others here rather than in an exchange of tensors, where neither Ctrl-C nor the failure of another rank
could reach it. A thread tells the others that the process is alive, so a rank that works for an hour is told from one that is
gone.

Nothing here imports torch before there are several to meet.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from hybridfl.errors import HybridflError
from hybridfl.world import World

CONNECT_SECONDS = 300.0
"""How long ranks wait for each other to start."""
TIMEOUT_SECONDS = 60.0
"""How long one may be silent, until the config says how long."""
LOOK_SECONDS = 0.5
"""How often a rank looks after the others."""
BEAT_SECONDS = 1.0
"""How often it shows that it is alive, or more often where the timeout is short."""
PARTING_SECONDS = (3.0, 15.0)
"""How long rank 0, and how long others, wait for each other after an interruption; torchrun kills after 30 s."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""


class RankFailed(HybridflError):
    """What went wrong on a rank, here or elsewhere.

    Args:
        detail: for the log: the traceback of what nobody foresaw.
    """

    def __init__(self, message: str, detail: str = "", exit_status: int = 1) -> None:
        super().__init__(message)
        self.detail = detail or message
        self.exit_status = exit_status


class RanksLost(HybridflError):
    """Ranks that have not been heard of."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass
class _Seen:
    """The last sign of life of a rank, and when it came."""

    beat: str
    at: float


class Rendezvous:
    """The store as one of the ranks sees it.

    Attributes:
        rank, size: which of how many.
        store: torch's own, at which exchanges of tensors can begin.
        timeout: seconds without a sign of life after which a rank counts as lost.

    Raises:
        HybridflError: the others cannot be met.
    """

    def __init__(self, world: World) -> None:
        self.rank, self.size = world[:2]
        self.timeout = TIMEOUT_SECONDS
        self._turn = 0
        self._beat = BEAT_SECONDS / 10
        self._looked = time.monotonic()
        self._gone: set[int] = set()
        self._storeless = False
        self._connect(world)

    def _connect(self, world: World) -> None:
        # Or its C++ part warns of every attempt to reach a rank that is not up yet.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        # torchrun's own process holds the store, and starts all ranks anew with --max-restarts.
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

        def client(holds: bool) -> Any:
            wait = timedelta(seconds=CONNECT_SECONDS)
            store = TCPStore(world.address, world.port, None, holds, wait, wait_for_workers=False)
            return PrefixStore(f"hybridfl/{attempt}", store)

        try:
            self.store = client(self.rank == 0 and not hosted)
            own = client(False)  # for the thread, as waiting blocks the other one
        except RuntimeError as error:
            where = f"{world.address}:{world.port}"
            raise HybridflError(
                f"rank {self.rank} of {self.size} cannot meet the others at {where}: {first_line(error)}"
            ) from error
        self._seen = {r: _Seen("", time.monotonic()) for r in range(self.size) if r != self.rank}
        self._over = threading.Event()
        threading.Thread(target=self._live, args=(own,), daemon=True).start()

    def _live(self, store: Any) -> None:
        """Signs of life, until the group ends."""
        host, count = socket.gethostname(), 0
        while True:
            count += 1
            try:
                store.set(f"alive/{self.rank}", f"{host} {count}")
            except RuntimeError:  # the store is gone; the main thread finds out for itself
                return
            if self._over.wait(self._beat):
                return

    def set_timeout(self, timeout: float) -> None:
        """From now on ranks count as lost after so many seconds; this one shows its life more often than that."""
        self.timeout = timeout
        self._beat = min(timeout / 5, BEAT_SECONDS)

    def name(self, rank: int) -> str:
        """The rank for people, with its machine if that is known."""
        own = rank == self.rank
        host = socket.gethostname() if own else self._seen[rank].beat.partition(" ")[0]
        return f"rank {rank} of {self.size}" + (f" ({host})" if host else "")

    def gather(self, about: str, value: Any) -> list[Any]:
        """Everybody's value, in the order of ranks.

        Args:
            about: the same on all ranks.
            value: as JSON can hold.

        Raises:
            HybridflError: ``about`` is not the same.
        """
        self._turn += 1
        with self.asked():
            self.store.set(f"{self._turn}/{self.rank}", json.dumps([about, value]))
            # Who has come to the last turn has read what was said in the one before.
            if self._turn > 2:
                self.store.delete_key(f"{self._turn - 2}/{self.rank}")
        keys = [f"{self._turn}/{rank}" for rank in range(self.size)]
        self.wait_for(keys)
        with self.asked():
            said = [json.loads(told) for told in self.store.multi_get(keys)]
        for rank, (other, _) in enumerate(said):
            if other != said[0][0]:
                problem = f"rank 0 has {said[0][0]}, and {self.name(rank)} has {other}"
                raise HybridflError(f"{problem}: the method decides by something that is not the same everywhere.")
        return [value for _, value in said]

    def look(self) -> None:
        """Whether all others are well; asks the store only now and then.

        Raises:
            RankFailed: one has failed.
            KeyboardInterrupt: one was interrupted.
            RanksLost: one has been silent for too long.
        """
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        with self.asked():
            failed = json.loads(self.store.get("failed")) if self.store.check(["failed"]) else None
        if failed and failed["rank"] != self.rank:
            if failed["status"] == INTERRUPTED:
                raise KeyboardInterrupt
            raise RankFailed(failed["text"], failed["detail"], failed["status"])
        self._look_for_life()

    def _look_for_life(self) -> None:
        now = time.monotonic()
        with self.asked():
            for rank, seen in self._seen.items():
                key = f"alive/{rank}"
                if rank in self._gone or not self.store.check([key]):
                    continue
                beat = self.store.get(key).decode()
                if beat != seen.beat:
                    seen.beat, seen.at = beat, now
        lost = [
            rank
            for rank, seen in self._seen.items()
            if now - seen.at > (self.timeout if seen.beat else max(self.timeout, CONNECT_SECONDS))
        ]
        if lost := [rank for rank in lost if rank not in self._gone]:
            self._gone |= set(lost)
            names = ", ".join(map(self.name, lost))
            silent = max(now - self._seen[rank].at for rank in lost)
            raise RanksLost(f"no sign of life from {names} for {silent:.0f} s (executor.timeout_seconds).", lost)

    def wait_for(self, keys: list[str], grace: float = math.inf) -> None:
        """Wait until all keys are at the store, or so many seconds; meanwhile look after the others."""
        for _ in patiently(grace):
            with self.asked():
                # Not the store's own wait, which Ctrl-C cannot end.
                if keys and self.store.check(keys):
                    return
            self.look()

    @contextmanager
    def asked(self) -> Iterator[None]:
        """A store that does not answer is lost with the process that holds it."""
        try:
            yield
        except RuntimeError as error:
            raise self._without_store(error) from error

    def _without_store(self, error: Exception) -> RanksLost:
        self._gone.add(0)
        self._storeless = True
        return RanksLost(f"the process where the {self.size} ranks meet is gone: {first_line(error)}", [0])

    # -- ending together ----------------------------------------------------------------------------------------------

    @property
    def speaker(self) -> int:
        """The rank that speaks for all: rank 0 if it is there."""
        return min(set(range(self.size)) - self._gone)

    def tell(self, error: BaseException) -> int:
        """Leave word of it at the store, unless somebody else has; the exit status it leads to."""
        interrupted = isinstance(error, KeyboardInterrupt)
        status = INTERRUPTED if interrupted else getattr(error, "exit_status", 1)
        text = str(error) if isinstance(error, HybridflError) else f"{type(error).__name__}: {error}"
        detail = getattr(error, "detail", "") or "".join(traceback.format_exception(error))
        told = {"rank": self.rank, "status": status, "text": text, "detail": detail}
        if not self._storeless:
            with suppress(RuntimeError):
                self.store.compare_set("failed", "", json.dumps(told))
        return status

    def wait_for_the_first(self) -> None:
        """Until rank 0 has ended, or something went wrong."""
        if self.rank != 0:
            self.wait_for(["ended/0"])

    def part(self, status: int) -> int:
        """Part from the others, rank 0 last: it may hold the store. All ranks' exit status is rank 0's."""
        if self._storeless:
            return status
        others = [rank for rank in range(self.size) if rank != 0]
        # After an interruption torchrun waits no longer than that.
        limit = PARTING_SECONDS[self.rank > 0] if status == INTERRUPTED else math.inf
        with suppress(HybridflError, KeyboardInterrupt, RuntimeError):
            if self.rank == 0:
                self.store.set("ended/0", str(status))
                self._await_parting([f"ended/{rank}" for rank in others], limit)
            else:
                self._await_parting(["ended/0"], limit)
                if self.store.check(["ended/0"]):
                    status = int(self.store.get("ended/0"))
                self.store.set(f"ended/{self.rank}", str(status))
        self._over.set()
        return status

    def _await_parting(self, keys: list[str], limit: float) -> None:
        """Wait for those of the ranks' keys that can still come."""
        for _ in patiently(limit):
            waiting = [key for key in keys if int(key.rpartition("/")[2]) not in self._gone]
            if not waiting or self.store.check(waiting):
                return
            with suppress(RanksLost):
                self._look_for_life()


def patiently(limit: float = math.inf) -> Iterator[None]:
    """Again and again for so many seconds, at once at first and then every few hundredths of a second."""
    end, pause = time.monotonic() + limit, 1e-5
    while time.monotonic() < end:
        yield
        time.sleep(pause)
        pause = min(1.5 * pause, 0.02)


def first_line(error: BaseException) -> str:
    """What an error says, without the traces that torch adds in further lines; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
