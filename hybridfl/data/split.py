"""The split of a run: the server's share, the clients' shares, their validation views and test sets."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridfl.data.dataset import Dataset, Examples, IntArray, int_array
from hybridfl.data.dealing import deal
from hybridfl.data.holding_out import cells_of, clients_tests, held_out_by_task, servers_test
from hybridfl.data.partitioning import Partitioning
from hybridfl.data.server_data import Load, ServerData, ServerShare
from hybridfl.errors import DataError
from hybridfl.rng import stream
from hybridfl.tasks import TaskStream


@dataclass(frozen=True, eq=False)
class Split:
    """Who owns which examples. All arrays are sorted int64 indices.

    Attributes:
        clients_train, clients_val: one array per client, into the data set's train part. Disjoint between clients, and
            with the server's, unless the partitioning says that clients share examples.
        clients_test: one array per client, into the data set's *test* part; those of two clients may overlap.
        server_train, server_val: empty without server data; positions from the train part's length on are examples that
            only the server has, see :class:`Drawn`.
        class_counts: ``(clients, classes)``, examples of each class that a client owns for training and validation.
        domain_counts: ``(clients, domains)``, the same by domain.
        moved: examples that changed hands so that every client has the minimum.
        server_test: the server's test set, in the test part: the examples of the domains that clients have. ``None`` is
            the whole test part.

    A partitioning or the server's data may leave examples to nobody; otherwise the train part is dealt out completely.
    """

    clients_train: tuple[IntArray, ...]
    clients_val: tuple[IntArray, ...]
    clients_test: tuple[IntArray, ...]
    server_train: IntArray
    server_val: IntArray
    class_counts: IntArray
    domain_counts: IntArray
    moved: int = 0
    server_test: IntArray | None = None

    @property
    def digest(self) -> str:
        """12 hex digits over all indices: equal digests mean the same split."""
        total = hashlib.sha256(str(len(self.clients_train)).encode())
        for indices in self._arrays():
            total.update(len(indices).to_bytes(8, "little"))
            total.update(indices.astype("<i8").tobytes())
        return total.hexdigest()[:12]

    def _arrays(self) -> Iterator[IntArray]:
        yield from self.clients_train
        yield from self.clients_val
        yield from self.clients_test
        yield self.server_train
        yield self.server_val
        if self.server_test is not None:
            yield self.server_test

    @property
    def is_shared(self) -> bool:
        """Whether an example belongs to two clients, or twice to one."""
        owned = np.concatenate([*self.clients_train, *self.clients_val])
        return len(np.unique(owned)) < len(owned)

    @property
    def client_domains(self) -> list[int]:
        """The domain that most examples of each client come from."""
        return [int(counts.argmax()) for counts in self.domain_counts]

    def to_json(self) -> dict[str, Any]:
        """Plain containers for ``json.dump``; ``sizes`` and ``class_counts`` are there for the reader's eye."""
        clients = [
            {
                "sizes": {"train": len(train), "val": len(val), "test": len(test)},
                "class_counts": counts.tolist(),
                "domain_counts": domains.tolist(),
                "train": train.tolist(),
                "val": val.tolist(),
                "test": test.tolist(),
            }
            for train, val, test, counts, domains in zip(
                self.clients_train,
                self.clients_val,
                self.clients_test,
                self.class_counts,
                self.domain_counts,
                strict=True,
            )
        ]
        server = {
            "sizes": {"train": len(self.server_train), "val": len(self.server_val)},
            "train": self.server_train.tolist(),
            "val": self.server_val.tolist(),
            "test": None if self.server_test is None else self.server_test.tolist(),
        }
        return {"digest": self.digest, "moved": self.moved, "server": server, "clients": clients}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Split:
        """The split that :meth:`to_json` wrote.

        Raises:
            DataError: something is missing, or the indices do not have the digest stored with them.
        """
        try:
            clients, server = stored["clients"], stored["server"]
            split = cls(
                clients_train=tuple(int_array(client["train"]) for client in clients),
                clients_val=tuple(int_array(client["val"]) for client in clients),
                clients_test=tuple(int_array(client["test"]) for client in clients),
                server_train=int_array(server["train"]),
                server_val=int_array(server["val"]),
                class_counts=np.array([client["class_counts"] for client in clients], dtype=np.int64),
                domain_counts=np.array([client["domain_counts"] for client in clients], dtype=np.int64),
                moved=int(stored["moved"]),
                server_test=None if server["test"] is None else int_array(server["test"]),
            )
            digest = stored["digest"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"stored split: damaged ({type(error).__name__}: {error}); draw it again.") from error
        if split.digest != digest:
            raise DataError(f"stored split: its digest is {digest}, its indices have {split.digest}; draw it again.")
        return split


@dataclass(frozen=True, eq=False)
class Drawn:
    """A data set and who owns what of it.

    Attributes:
        dataset: of the clients' task.
        pool: its training part, followed by the examples that only the server has. These have domains of their own, and
            their labels, if they are not of the clients' task, may be any.
        domains: names of the domains in the pool: the data set's, then the server's own.
        split: of the pool and of the test part.
        tasks: the classes that come one after the other.
        provides: what the server's data provide, see :class:`~hybridfl.data.server_data.ServerData`.
        sources: fingerprints of other data sets that were read.
    """

    dataset: Dataset
    pool: Examples
    domains: tuple[str, ...]
    split: Split
    tasks: TaskStream
    provides: frozenset[str]
    sources: tuple[str, ...] = ()


def draw_split(
    dataset: Dataset,
    partitioning: Partitioning,
    server_data: ServerData,
    clients: int,
    client_validation: float,
    min_test: int,
    seed: int,
    load: Load,
    tasks: TaskStream,
) -> Drawn:
    """The server's share first, then the rest to the clients; then validation views and the clients' test sets.

    A partitioning that names its examples itself (``before_server``) goes before the server.

    Args:
        dataset: of which ``train`` is dealt out and ``test`` serves the test sets.
        clients: their number.
        client_validation: fraction of each client's examples that is held out; rounded, and never all of them.
        min_test: size that a client's test set has at least, as far as the test part has the examples.
        seed: the run's; ``partitioning.seed`` goes before it. Every stream has a key of its own, so one client's
            validation view does not depend on another's.
        load: reads other data sets, which the server may have.
        tasks: each is dealt out to all clients by itself.

    Raises:
        ConfigError: more clients than examples, an option of the two nodes does not fit, or somebody has no example of a
            task.
        DataError: the test part has none of a client's classes.
    """
    seed = seed if partitioning.seed is None else partitioning.seed
    server, owned, moved = deal(dataset, partitioning, server_data, clients, seed, load, tasks)
    pool, names = _pool(dataset, server)
    servers = np.concatenate([server.taken, np.arange(len(dataset.train), len(pool))])
    cells = cells_of(pool, int(pool.y.max()) + 1)
    held_out = functools.partial(held_out_by_task, y=pool.y, cells=cells, tasks=tasks)
    views = [
        held_out(share, fraction=client_validation, rng=stream(seed, "validation", client))
        for client, share in enumerate(owned)
    ]
    server_train, server_val = held_out(
        servers, fraction=server_data.validation, rng=stream(seed, "validation", "server")
    )
    counts = [np.bincount(dataset.train.y[share], minlength=dataset.classes) for share in owned]
    domains = np.array([np.bincount(dataset.train.domain[share], minlength=len(dataset.domains)) for share in owned])
    split = Split(
        clients_train=tuple(train for train, _ in views),
        clients_val=tuple(val for _, val in views),
        clients_test=clients_tests(dataset, owned, domains, min_test, seed),
        server_train=server_train,
        server_val=server_val,
        class_counts=int_array(counts),
        domain_counts=int_array(domains),
        moved=moved,
        server_test=servers_test(dataset, domains.sum(0)),
    )
    return Drawn(dataset, pool, names, split, tasks, frozenset(server_data.provides), server.sources)


def _pool(dataset: Dataset, server: ServerShare) -> tuple[Examples, tuple[str, ...]]:
    """The training part and what only the server has, and the names of all domains in it."""
    if server.own is None:
        return dataset.train, dataset.domains
    own = Examples(server.own.x, server.own.y, server.own.domain + len(dataset.domains))
    return dataset.train.followed_by(own), (*dataset.domains, *server.domains)
