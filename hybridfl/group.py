"""The processes that do one run together, as ``torchrun`` starts them: ranks 0 … n - 1.

They plan the run together, exchange tensors through torch.distributed and end together. Before every exchange each rank says
where they meet (:mod:`hybridfl.rendezvous`) that it is ready, and waits for the others there.

Nothing here imports torch before a group of several is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from hybridfl.errors import HybridflError
from hybridfl.rendezvous import LOOK_SECONDS, RankFailed, Rendezvous, first_line, patiently
from hybridfl.world import World

if TYPE_CHECKING:
    from torch import Tensor, device

T = TypeVar("T")

SLOWEST = 1e6
"""Bytes a second below which an exchange counts as stuck."""


class Group:
    """This process among the ranks; without a world it is alone, and everything here is nothing to do.

    Attributes:
        rank, size: which of how many.
        drifted: how often the ranks' states differed after a round.
    """

    def __init__(self, world: World | None = None) -> None:
        self.rank, self.size = (0, 1) if world is None else world[:2]
        self.drifted = 0
        self._rendezvous = None if world is None else Rendezvous(world)
        self._stuck = False
        self._home: device | None = None

    def start(self, backend: str, home: device, timeout: float) -> None:
        """Make the exchange of tensors ready.

        Args:
            backend: ``gloo`` or ``nccl``.
            home: where the run's tensors are.
            timeout: seconds without a sign of life after which a rank counts as lost.
        """
        assert self._rendezvous is not None
        import torch
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        self._rendezvous.set_timeout(timeout)
        self._home = home
        self.wire = home if backend == "nccl" else torch.device("cpu")
        if home.type == "cuda":
            torch.cuda.set_device(home)
        with self._rendezvous.asked():
            dist.init_process_group(
                backend,
                store=PrefixStore("group", self._rendezvous.store),
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
            if self._rendezvous is not None:
                self._rendezvous.tell(error)
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
        return f"rank {rank} of {self.size}" if self._rendezvous is None else self._rendezvous.name(rank)

    def look(self) -> None:
        """Whether all others are well, see :meth:`~hybridfl.rendezvous.Rendezvous.look`."""
        if self._rendezvous is not None:
            self._rendezvous.look()

    # -- exchanging ---------------------------------------------------------------------------------------------------

    def gather(self, about: str, value: Any) -> list[Any]:
        """Everybody's value, in the order of ranks, see :meth:`~hybridfl.rendezvous.Rendezvous.gather`."""
        return [value] if self._rendezvous is None else self._rendezvous.gather(about, value)

    def exchange(self, parcel: Tensor | None, about: str) -> list[Tensor | None]:
        """Everybody's parcel, see :mod:`hybridfl.parcels`; None from those who send nothing.

        Args:
            about: the same on all ranks, as in :meth:`gather`.
        """
        if self._rendezvous is None:
            return [parcel]
        import torch
        import torch.distributed as dist

        lengths = self.gather(about, 0 if parcel is None else len(parcel))
        parcels: list[Tensor | None] = []
        works: list[tuple[int, Any]] = []
        with self._rendezvous.asked():
            for rank, length in enumerate(lengths):
                if not length:
                    parcels.append(None)
                    continue
                room = parcel if rank == self.rank else None
                if room is None:
                    room = torch.empty(length, dtype=torch.uint8, device=self.wire)
                parcels.append(room)
                works.append((rank, dist.broadcast(room, rank, async_op=True)))
        self._finish(self._rendezvous, works, sum(lengths))
        return parcels

    def _finish(self, rendezvous: Rendezvous, works: Sequence[tuple[int, Any]], size: int) -> None:
        """Wait for transfers under way, as one that can be interrupted."""
        # Later than a rank that is gone is found out for itself, and named.
        deadline = time.monotonic() + 2 * rendezvous.timeout + 2 * LOOK_SECONDS + size / SLOWEST
        for source, work in works:
            try:
                for _ in patiently():
                    if work.is_completed():
                        break
                    rendezvous.look()
                    if time.monotonic() > deadline:
                        raise HybridflError(f"what {self.name(source)} sends to all others does not arrive.")
            except BaseException:
                self._stuck = True  # transfers under way would hold up the end of the process
                raise
            try:
                work.wait()
            except RuntimeError as error:
                # First the other's own reason, or which of them is silent.
                rendezvous.wait_for([], rendezvous.timeout + 2 * LOOK_SECONDS)
                raise HybridflError(f"what {self.name(source)} sends was cut off: {first_line(error)}") from error

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
            if self._rendezvous is None:
                raise
            status = self._rendezvous.tell(error)
            if self.rank == self._rendezvous.speaker:
                raise
            raise SystemExit(status) from None

    def wait_for_the_first(self) -> None:
        """Until rank 0 has ended, or something went wrong."""
        if self._rendezvous is not None:
            self._rendezvous.wait_for_the_first()

    def end(self, status: int) -> int:
        """Part from the others; all ranks' exit status is rank 0's."""
        if self._rendezvous is not None:
            status = self._rendezvous.part(status)
        if status == 0 and self._home is not None:
            import torch.distributed as dist

            dist.destroy_process_group()
        return status

    @property
    def stuck(self) -> bool:
        """Whether transfers are under way that nobody will finish; the process can only be ended at once."""
        return self._stuck
