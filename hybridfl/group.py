"""The processes that do one run together, as ``torchrun`` starts them: ranks 0 … n - 1.

They meet at a store of small texts (torch's ``TCPStore``) and exchange tensors through torch.distributed. Before every
exchange each rank says at the store that it is ready and waits for the others there, rather than in the exchange itself,
where neither Ctrl-C nor the failure of another rank could reach it. A thread tells the others that the process is alive, so a
rank that works for an hour is told from one that is gone.

Nothing here imports torch before a group of several is made.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hybridfl.errors import ConfigError, HybridflError

if TYPE_CHECKING:
    from torch import Tensor, device

T = TypeVar("T")

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
SLOWEST = 1e6
"""Bytes a second below which an exchange counts as stuck."""
INTERRUPTED = 130


class World(NamedTuple):
    """Where this process stands among those started together.

    Attributes:
        rank, size: which of how many.
        local: which of those on this machine.
        address, port: where they meet.
    """

    rank: int
    size: int
    local: int
    address: str
    port: int


def world_of(environment: Mapping[str, str]) -> World | None:
    """What ``torchrun`` says in the environment; None for a process by itself.

    Raises:
        ConfigError: a part of it is missing or no number.
    """
    if environment.get("WORLD_SIZE", "1") == "1" or "RANK" not in environment:
        return None
    try:
        rank, size, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local = int(environment.get("LOCAL_RANK", rank))
        return World(rank, size, local, environment["MASTER_ADDR"], port)
    except (KeyError, ValueError) as error:
        problem = f"RANK and WORLD_SIZE are set, but the rest is not as torchrun sets it ({error})"
        raise ConfigError("executor", f"{problem}; start with torchrun, or unset RANK and WORLD_SIZE.") from error


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


class Group:
    """This process among the ranks; without a world it is alone, and everything here is nothing to do.

    Attributes:
        rank, size: which of how many.
        timeout: seconds without a sign of life after which a rank counts as lost.
        drifted: how often the ranks' states differed after a round.
    """

    def __init__(self, world: World | None = None) -> None:
        self.rank, self.size = (0, 1) if world is None else world[:2]
        self.timeout = TIMEOUT_SECONDS
        self.drifted = 0
        self._turn = 0
        self._beat = BEAT_SECONDS / 10
        self._looked = time.monotonic()
        self._gone: set[int] = set()
        self._stuck = self._storeless = False
        self._home: device | None = None
        if world is not None:
            self._connect(world)

    # -- meeting ------------------------------------------------------------------------------------------------------

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
            self._store = client(self.rank == 0 and not hosted)
            own = client(False)  # for the thread, as waiting blocks the other one
        except RuntimeError as error:
            where = f"{world.address}:{world.port}"
            raise HybridflError(
                f"rank {self.rank} of {self.size} cannot meet the others at {where}: {_line(error)}"
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

    def start(self, backend: str, home: device, timeout: float) -> None:
        """Make the exchange of tensors ready.

        Args:
            backend: ``gloo`` or ``nccl``.
            home: where the run's tensors are.
            timeout: see ``timeout`` of the class.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        self.timeout = timeout
        self._beat = min(timeout / 5, BEAT_SECONDS)
        self._home = home
        self.wire = home if backend == "nccl" else torch.device("cpu")
        if home.type == "cuda":
            torch.cuda.set_device(home)
        with self._asked():
            dist.init_process_group(
                backend,
                store=PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=max(600.0, 10 * timeout)),
            )

    def planned(self, make: Callable[[], T], identity: Callable[[T], str]) -> T:
        """What every rank makes for itself before anything starts.

        Args:
            identity: the same text on all ranks, or they are not of one run.

        Raises:
            HybridflError: some rank's mistake, on the first rank that made it.
            SystemExit: on the others, with the same status.
        """
        made, mistake = None, None
        try:
            made = make()
        except KeyboardInterrupt as error:
            self._tell(error)
            raise
        except Exception as error:
            mistake = error
        status = 0 if mistake is None else getattr(mistake, "exit_status", 1)
        text = "" if mistake is None else f"{type(mistake).__name__}: {mistake}"
        same = "" if made is None else identity(made)
        said = self.gather("a run to plan", [status, text, same])
        texts = [text for _, text, _ in said]
        if any(texts):
            if mistake is None or texts.index(text) != self.rank:
                raise SystemExit(max(status for status, _, _ in said))
            if all(texts) or not isinstance(mistake, HybridflError):
                raise mistake
            raise RankFailed(f"{self.name(self.rank)}: {mistake}", exit_status=status) from mistake
        assert made is not None
        names = [name for _, _, name in said]
        if len(set(names)) > 1:
            if self.rank != 0:
                raise SystemExit(2)
            other = next(r for r, name in enumerate(names) if name != names[0])
            told = f"rank 0 has the run {names[0]}, and {self.name(other)} has {names[other]}"
            raise RankFailed(f"{told}: their configs, data, devices or versions of the code differ.", exit_status=2)
        return made

    def name(self, rank: int) -> str:
        """The rank for people, with its machine if that is known."""
        own = rank == self.rank
        host = socket.gethostname() if own else self._seen[rank].beat.partition(" ")[0]
        return f"rank {rank} of {self.size}" + (f" ({host})" if host else "")

    # -- exchanging ---------------------------------------------------------------------------------------------------

    def gather(self, about: str, value: Any) -> list[Any]:
        """Everybody's value, in the order of ranks.

        Args:
            about: the same on all ranks.
            value: as JSON can hold.

        Raises:
            HybridflError: ``about`` is not the same.
        """
        if self.size == 1:
            return [value]
        self._turn += 1
        with self._asked():
            self._store.set(f"{self._turn}/{self.rank}", json.dumps([about, value]))
            # Who has come to the last turn has read what was said in the one before.
            if self._turn > 2:
                self._store.delete_key(f"{self._turn - 2}/{self.rank}")
        keys = [f"{self._turn}/{rank}" for rank in range(self.size)]
        self._await(keys)
        with self._asked():
            said = [json.loads(told) for told in self._store.multi_get(keys)]
        for rank, (other, _) in enumerate(said):
            if other != said[0][0]:
                problem = f"rank 0 has {said[0][0]}, and {self.name(rank)} has {other}"
                raise HybridflError(f"{problem}: the method decides by something that is not the same everywhere.")
        return [value for _, value in said]

    def exchange(self, parcel: Tensor | None, about: str) -> list[Tensor | None]:
        """Everybody's parcel, see :mod:`hybridfl.parcels`; None from those who send nothing.

        Args:
            about: the same on all ranks, as in :meth:`gather`.
        """
        import torch
        import torch.distributed as dist

        lengths = self.gather(about, 0 if parcel is None else len(parcel))
        parcels: list[Tensor | None] = []
        works: list[tuple[int, Any]] = []
        with self._asked():
            for rank, length in enumerate(lengths):
                if not length:
                    parcels.append(None)
                    continue
                room = parcel if rank == self.rank else None
                if room is None:
                    room = torch.empty(length, dtype=torch.uint8, device=self.wire)
                parcels.append(room)
                works.append((rank, dist.broadcast(room, rank, async_op=True)))
        self._finish(works, sum(lengths))
        return parcels

    def _finish(self, works: Sequence[tuple[int, Any]], size: int) -> None:
        """Wait for transfers under way, as one that can be interrupted."""
        # Later than a rank that is gone is found out for itself, and named.
        deadline = time.monotonic() + 2 * self.timeout + 2 * LOOK_SECONDS + size / SLOWEST
        for source, work in works:
            try:
                for _ in _patiently():
                    if work.is_completed():
                        break
                    self.look()
                    if time.monotonic() > deadline:
                        raise HybridflError(f"what {self.name(source)} sends to all others does not arrive.")
            except BaseException:
                self._stuck = True  # transfers under way would hold up the end of the process
                raise
            try:
                work.wait()
            except RuntimeError as error:
                # First the other's own reason, or which of them is silent.
                self._await([], self.timeout + 2 * LOOK_SECONDS)
                raise HybridflError(f"what {self.name(source)} sends was cut off: {_line(error)}") from error

    def share(self, value: Any = None) -> Any:
        """Rank 0's value on all ranks."""
        if self.size == 1:
            return value
        from hybridfl.parcels import pack, unpack

        assert self._home is not None
        parcel = pack(value, self.wire) if self.rank == 0 else None
        sent = self.exchange(parcel, "a value to share")[0]
        assert sent is not None
        return value if self.rank == 0 else unpack(sent, self._home)

    def agreed(self, value: T, of: Any) -> T:
        """The value, or rank 0's where some rank's differs, if only in a last digit as processors of two kinds may.

        Args:
            of: what must agree.
        """
        if self.size == 1:
            return value
        from hybridfl.parcels import checksum

        if len(set(self.gather("a state to compare", checksum(of)))) == 1:
            return value
        self.drifted += 1
        shared: T = self.share(value)
        return shared

    # -- looking after each other -------------------------------------------------------------------------------------

    def look(self) -> None:
        """Whether all others are well; asks the store only now and then.

        Raises:
            RankFailed: one has failed.
            KeyboardInterrupt: one was interrupted.
            RanksLost: one has been silent for too long.
        """
        if self.size == 1 or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        with self._asked():
            failed = json.loads(self._store.get("failed")) if self._store.check(["failed"]) else None
        if failed and failed["rank"] != self.rank:
            if failed["status"] == INTERRUPTED:
                raise KeyboardInterrupt
            raise RankFailed(failed["text"], failed["detail"], failed["status"])
        self._look_for_life()

    def _look_for_life(self) -> None:
        now = time.monotonic()
        with self._asked():
            for rank, seen in self._seen.items():
                key = f"alive/{rank}"
                if rank in self._gone or not self._store.check([key]):
                    continue
                beat = self._store.get(key).decode()
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

    def _await(self, keys: list[str], grace: float = math.inf) -> None:
        """Wait until all keys are at the store, or so many seconds; meanwhile look after the others."""
        for _ in _patiently(grace):
            with self._asked():
                # Not the store's own wait, which Ctrl-C cannot end.
                if keys and self._store.check(keys):
                    return
            self.look()

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """A store that does not answer is lost with the process that holds it."""
        try:
            yield
        except RuntimeError as error:
            raise self._without_store(error) from error

    def _without_store(self, error: Exception) -> RanksLost:
        self._gone.add(0)
        self._storeless = True
        return RanksLost(f"the process where the {self.size} ranks meet is gone: {_line(error)}", [0])

    # -- ending together ----------------------------------------------------------------------------------------------

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What goes wrong inside is told to all ranks, and said aloud by one: rank 0 if it is there.

        Raises:
            SystemExit: on the others.
        """
        try:
            yield
        except BaseException as error:
            if self.size == 1:
                raise
            status = self._tell(error)
            if self.rank == min(set(range(self.size)) - self._gone):
                raise
            raise SystemExit(status) from None

    def _tell(self, error: BaseException) -> int:
        """Leave word of it at the store, unless somebody else has; the exit status it leads to."""
        interrupted = isinstance(error, KeyboardInterrupt)
        status = INTERRUPTED if interrupted else getattr(error, "exit_status", 1)
        text = str(error) if isinstance(error, HybridflError) else f"{type(error).__name__}: {error}"
        detail = getattr(error, "detail", "") or "".join(traceback.format_exception(error))
        told = {"rank": self.rank, "status": status, "text": text, "detail": detail}
        if not self._storeless:
            with suppress(RuntimeError):
                self._store.compare_set("failed", "", json.dumps(told))
        return status

    def wait_for_the_first(self) -> None:
        """Until rank 0 has ended, or something went wrong."""
        if self.rank != 0:
            self._await(["ended/0"])

    def end(self, status: int) -> int:
        """Part from the others, rank 0 last: it may hold the store. All ranks' exit status is rank 0's."""
        if self.size == 1 or self._storeless:
            return status
        others = [rank for rank in range(self.size) if rank != 0]
        # After an interruption torchrun waits no longer than that.
        limit = PARTING_SECONDS[self.rank > 0] if status == INTERRUPTED else math.inf
        with suppress(HybridflError, KeyboardInterrupt, RuntimeError):
            if self.rank == 0:
                self._store.set("ended/0", str(status))
                self._part([f"ended/{rank}" for rank in others], limit)
            else:
                self._part(["ended/0"], limit)
                if self._store.check(["ended/0"]):
                    status = int(self._store.get("ended/0"))
                self._store.set(f"ended/{self.rank}", str(status))
        self._over.set()
        if status == 0 and self._home is not None:
            import torch.distributed as dist

            dist.destroy_process_group()
        return status

    @property
    def stuck(self) -> bool:
        """Whether transfers are under way that nobody will finish; the process can only be ended at once."""
        return self._stuck

    def _part(self, keys: list[str], limit: float) -> None:
        """Wait for those of the ranks' keys that can still come."""
        for _ in _patiently(limit):
            waiting = [key for key in keys if int(key.rpartition("/")[2]) not in self._gone]
            if not waiting or self._store.check(waiting):
                return
            with suppress(RanksLost):
                self._look_for_life()


def _patiently(limit: float = math.inf) -> Iterator[None]:
    """Again and again for so many seconds, at once at first and then every few hundredths of a second."""
    end, pause = time.monotonic() + limit, 1e-5
    while time.monotonic() < end:
        yield
        time.sleep(pause)
        pause = min(1.5 * pause, 0.02)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
