"""The split of a run: the server's share, the clients' shares, their validation views and test sets."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridfl.data.dataset import Dataset, Examples, IntArray, Labels, problem_of
from hybridfl.data.partition_domains import Domains
from hybridfl.data.partitioning import Partition, Partitioning
from hybridfl.data.server_data import Load, ServerData, ServerShare
from hybridfl.errors import ConfigError, DataError
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
                clients_train=tuple(_indices(client["train"]) for client in clients),
                clients_val=tuple(_indices(client["val"]) for client in clients),
                clients_test=tuple(_indices(client["test"]) for client in clients),
                server_train=_indices(server["train"]),
                server_val=_indices(server["val"]),
                class_counts=np.array([client["class_counts"] for client in clients], dtype=np.int64),
                domain_counts=np.array([client["domain_counts"] for client in clients], dtype=np.int64),
                moved=int(stored["moved"]),
                server_test=None if server["test"] is None else _indices(server["test"]),
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
    labels = Labels(dataset.train.y, dataset.train.domain)
    every = np.arange(len(labels))
    if getattr(partitioning, "before_server", False):
        partition = _partition(partitioning, labels, clients, seed, 0)
        owned = partition.shares
        server = _leftovers(partition, server_data, dataset, load, seed)
    else:
        server = _servers_share(server_data, dataset, every, load, seed)
        rest = np.setdiff1d(every, np.concatenate([server.taken, server.withheld]))
        partition = _by_task(partitioning, labels.at(rest), tasks, clients, seed, len(every) - len(rest))
        owned = [rest[share] for share in partition.shares]
    _check_tasks(tasks, owned, labels)
    pool, names = _pool(dataset, server)
    servers = np.concatenate([server.taken, np.arange(len(every), len(pool))])
    cells = _cells(pool, int(pool.y.max()) + 1)
    held_out = functools.partial(_held_out_by_task, y=pool.y, cells=cells, tasks=tasks)
    views = [
        held_out(share, fraction=client_validation, rng=stream(seed, "validation", client))
        for client, share in enumerate(owned)
    ]
    server_train, server_val = held_out(
        servers, fraction=server_data.validation, rng=stream(seed, "validation", "server")
    )
    counts = [np.bincount(labels.y[share], minlength=dataset.classes) for share in owned]
    domains = np.array([np.bincount(labels.domain[share], minlength=len(dataset.domains)) for share in owned])
    split = Split(
        clients_train=tuple(train for train, _ in views),
        clients_val=tuple(val for _, val in views),
        clients_test=_test_sets(dataset, owned, domains, min_test, seed),
        server_train=server_train,
        server_val=server_val,
        class_counts=_indices(counts),
        domain_counts=_indices(domains),
        moved=partition.moved,
        server_test=_servers_test(dataset, domains.sum(0)),
    )
    return Drawn(dataset, pool, names, split, tasks, frozenset(server_data.provides), server.sources)


def _pool(dataset: Dataset, server: ServerShare) -> tuple[Examples, tuple[str, ...]]:
    """The training part and what only the server has, and the names of all domains in it."""
    if server.own is None:
        return dataset.train, dataset.domains
    own = Examples(server.own.x, server.own.y, server.own.domain + len(dataset.domains))
    return dataset.train.followed_by(own), (*dataset.domains, *server.domains)


def _cells(examples: Examples, classes: int) -> IntArray:
    """A number for each domain and class."""
    return classes * examples.domain + examples.y


def _servers_share(server_data: ServerData, dataset: Dataset, free: IntArray, load: Load, seed: int) -> ServerShare:
    try:
        share = server_data.share(dataset, free, load, stream(seed, "server_data"))
    except ConfigError as error:
        raise error.under("server_data") from error
    _check_share(share, dataset, free, server_data)
    return share


def _check_share(share: ServerShare, dataset: Dataset, free: IntArray, server_data: ServerData) -> None:
    # A user's own class may stand behind the node, and a wrong share would only show as a wrong result.
    name, own, theirs = type(server_data).__name__, share.own, dataset.train.x
    named = np.sort(np.concatenate([share.taken, share.withheld]))
    if len(np.unique(named)) < len(named) or len(np.setdiff1d(named, free)):
        raise ConfigError("server_data", f"{name}.share must name free examples, each once, as taken or withheld.")
    if own is None:
        return
    if own.x.shape[1:] != theirs.shape[1:] or own.x.dtype != theirs.dtype:
        problem = f"{name}.share gives images {own.x.shape[1:]} {own.x.dtype}"
        raise ConfigError("server_data", f"{problem}, the clients' are {theirs.shape[1:]} {theirs.dtype}.")
    classes = dataset.classes if "server_labels" in server_data.provides else int(own.y.max(initial=0)) + 1
    if problem_found := problem_of(own, classes, len(share.domains)):
        raise ConfigError("server_data", f"{name}.share gives examples of its own whose {problem_found}.")


def _leftovers(partition: Partition, server_data: ServerData, dataset: Dataset, load: Load, seed: int) -> ServerShare:
    """The server's share of what the clients leave.

    Raises:
        ConfigError: the server wants more than that, or leaves something and the partition should be complete.
    """
    examples = len(dataset.train)
    left = np.setdiff1d(np.arange(examples), np.concatenate(partition.shares))
    try:
        server = _servers_share(server_data, dataset, left, load, seed)
    except ConfigError as error:
        if error.key not in ("server_data.examples", "server_data.fraction"):
            raise
        if not len(left):
            problem = f"the partitioning gives all {examples} training examples to clients; use server_data=none."
            raise ConfigError("server_data", problem) from error
        told = f"{error.problem.removesuffix('.')} (what the partitioning leaves of {examples})."
        raise ConfigError(error.key, told) from error
    unnamed = len(left) - len(server.taken) - len(server.withheld)
    if partition.complete and unnamed:
        nobodys = f"{unnamed} training examples belong to no client and not to the server"
        way_out = "false leaves them out, server_data=share server_data.fraction=1 gives them to the server"
        raise ConfigError("partitioning.complete", f"got true, and {nobodys}; {way_out}.")
    return server


def _partition(
    partitioning: Partitioning, labels: Labels, clients: int, seed: int, servers: int, keys: tuple[int, ...] = ()
) -> Partition:
    if clients < 1:
        raise ConfigError("clients.number", f"got {clients}: must be at least 1; nearest valid value: 1.")
    if not len(labels):
        most = f", so that it has at most {servers - clients}" if servers > clients else ""
        problem = f"the server takes all {servers} training examples; leave one at least for each client{most}."
        raise ConfigError("server_data", problem)
    if clients > len(labels):
        after = f" after the server took {servers}" if servers else ""
        raise ConfigError(
            "clients.number",
            f"got {clients}: there are {len(labels)} training examples{after}; "
            f"the largest valid value is {len(labels)}.",
        )
    try:
        partition = partitioning.split(labels, clients, stream(seed, "partitioning", *keys))
    except ConfigError as error:
        raise error.under("partitioning") from error
    _check(partition, len(labels), clients, partitioning)
    return partition


def _by_task(
    partitioning: Partitioning, labels: Labels, tasks: TaskStream, clients: int, seed: int, servers: int
) -> Partition:
    """Every task dealt out to all clients by itself, from a stream of random numbers of its own."""
    if len(tasks) == 1:
        return _partition(partitioning, labels, clients, seed, servers)
    if isinstance(partitioning, Domains):
        _check_domains(tasks, labels)
        try:
            partitioning = partitioning.settled(labels, clients)
        except ConfigError as error:
            raise error.under("partitioning") from error
    whole: list[list[IntArray]] = [[] for _ in range(clients)]
    moved = 0
    for number, classes in enumerate(tasks.classes):
        members = np.flatnonzero(np.isin(labels.y, classes))
        try:
            partition = _partition(partitioning, labels.at(members), clients, seed, servers, (number,))
        except ConfigError as error:
            told = f"task {number} (classes {', '.join(map(str, classes))})"
            raise ConfigError(error.key, f"{told}: {error.problem}") from error
        moved += partition.moved
        for share, part in zip(whole, partition.shares, strict=True):
            share.append(members[part])
    return Partition([np.sort(np.concatenate(share)) for share in whole], moved, complete=False)


def _check_tasks(tasks: TaskStream, owned: list[IntArray], labels: Labels) -> None:
    """Every client has an example of every task: local work is given to it in all of them."""
    for number, classes in enumerate(tasks.classes):
        for client, share in enumerate(owned):
            if not np.isin(labels.y[share], classes).any():
                raise _too_many(tasks, number, f"client {client}, and each needs one or more")


def _check_domains(tasks: TaskStream, labels: Labels) -> None:
    """Every domain has an example of every task: a client's examples are all of its own domain."""
    for number, classes in enumerate(tasks.classes):
        missing = np.setdiff1d(labels.domain, labels.domain[np.isin(labels.y, classes)])
        if len(missing):
            raise _too_many(tasks, number, f"domain {missing[0]}, and its clients need one or more")


def _too_many(tasks: TaskStream, number: int, whose: str) -> ConfigError:
    told = f"task {number} (classes {', '.join(map(str, tasks.classes[number]))})"
    problem = f"got {len(tasks)}, but {told} has no training example of {whose}"
    return ConfigError("tasks.number", f"{problem}; choose fewer tasks (1 always fits) or another partitioning.")


def _check(partition: Partition, examples: int, clients: int, partitioning: Partitioning) -> None:
    # A user's own class may stand behind the node, and a wrong partition would only show as a wrong result.
    name = type(partitioning).__name__
    if len(partition.shares) != clients or not all(len(share) for share in partition.shares):
        raise ConfigError("partitioning", f"{name}.split must give each of the {clients} clients an example or more.")
    dealt, every = np.sort(np.concatenate(partition.shares)), np.arange(examples)
    if partition.shared:
        if len(np.setdiff1d(dealt, every)) or (partition.complete and len(np.unique(dealt)) < examples):
            each = ", each of them to somebody" if partition.complete else ""
            raise ConfigError("partitioning", f"{name}.split must deal out examples of 0 to {examples - 1}{each}.")
    elif getattr(partitioning, "before_server", False) or not partition.complete:
        if len(np.unique(dealt)) < len(dealt) or len(np.setdiff1d(dealt, every)):
            raise ConfigError("partitioning", f"{name}.split must deal out no example twice, of 0 to {examples - 1}.")
    elif not np.array_equal(dealt, every):
        raise ConfigError("partitioning", f"{name}.split must deal out each of the {examples} examples exactly once.")


def _held_out_by_task(
    owned: IntArray, y: IntArray, cells: IntArray, tasks: TaskStream, fraction: float, rng: np.random.Generator
) -> tuple[IntArray, IntArray]:
    """Train and validation part of an owner's examples; whoever has examples of a task keeps one for training."""
    if len(tasks) == 1:
        return _hold_out(owned, cells, fraction, rng)
    own = [owned[np.isin(y[owned], classes)] for classes in tasks.classes]
    train, val = zip(*(_hold_out(part, cells, fraction, rng) for part in own), strict=True)
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))


def _hold_out(owned: IntArray, cells: IntArray, fraction: float, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Train and validation part of an owner's examples, in the same proportions of cells (domain and class)."""
    size = min(_nearest(fraction * len(owned)), max(0, len(owned) - 1))
    found, counts = np.unique(cells[owned], return_counts=True)
    held = [
        rng.choice(owned[cells[owned] == cell], count, replace=False)
        for cell, count in zip(found, _apportion(size, counts, rng), strict=True)
        if count
    ]
    val = _indices(np.sort(np.concatenate(held)) if held else [])
    return _indices(np.sort(owned[~np.isin(owned, val)])), val


def _servers_test(dataset: Dataset, owned: IntArray) -> IntArray | None:
    """Test examples of the domains of which clients own any training examples; ``None`` for all."""
    within = owned[dataset.test.domain] > 0
    return None if within.all() else _indices(np.flatnonzero(within))


def _test_sets(
    dataset: Dataset, owned: list[IntArray], domains: IntArray, min_test: int, seed: int
) -> tuple[IntArray, ...]:
    """For each client examples of the test part, in the proportions of the cells (domain and class) it owns.

    Args:
        owned: each client's examples in the training part.
        domains: ``(clients, domains)``, numbers of these. A client with a tenth of the clients' examples of a domain is
            tested on as many examples as a tenth of this domain's test part has.
    """
    number = dataset.classes * len(dataset.domains)
    held, cells = _cells(dataset.train, dataset.classes), _cells(dataset.test, dataset.classes)
    pools = [np.flatnonzero(cells == cell) for cell in range(number)]
    available = np.array([len(pool) for pool in pools])
    tests = np.bincount(dataset.test.domain, minlength=len(dataset.domains))
    expected = (domains / np.maximum(domains.sum(0), 1)) @ tests
    sets = []
    for client, own in enumerate(owned):
        counts = np.bincount(held[own], minlength=number)
        proportions = np.where(available > 0, counts, 0)  # a cell without test examples cannot be tested
        if not proportions.any():
            classes = np.unique(dataset.train.y[own]).tolist()
            names = [dataset.domains[domain] for domain in np.flatnonzero(domains[client])]
            where = f" in the domains {', '.join(names)}" if len(dataset.domains) > 1 else ""
            raise DataError(
                f"{dataset.name}: the test part has no example of the classes {classes} of client {client}{where}."
            )
        # The largest size at which every cell's part, rounded up, is still there.
        most = min(int(a) * int(proportions.sum()) // int(p) for a, p in zip(available, proportions, strict=True) if p)
        size = min(max(min_test, 1, _nearest(expected[client])), most)
        rng = stream(seed, "test", client)
        drawn = [
            rng.choice(pool, count, replace=False)
            for pool, count in zip(pools, _apportion(size, proportions, rng), strict=True)
        ]
        sets.append(_indices(np.sort(np.concatenate(drawn))))
    return tuple(sets)


def _apportion(total: int, weights: IntArray, rng: np.random.Generator) -> IntArray:
    """``total`` in proportion to whole ``weights``, by largest remainder; equal remainders are drawn.

    Every part is its exact value rounded down or up, so with ``total`` ≤ the sum of weights none exceeds its weight.
    Whole-number arithmetic, because a remainder that is 0 must not become 1e-16.
    """
    if total == 0:
        return np.zeros_like(weights)
    whole = weights.sum()
    parts: IntArray = total * weights // whole
    remainders = total * weights % whole
    shuffled = rng.permutation(len(weights))
    order = shuffled[np.argsort(-remainders[shuffled], kind="stable")]
    parts[order[: total - parts.sum()]] += 1
    return parts


def _nearest(value: float) -> int:
    return int(np.floor(value + 0.5))


def _indices(values: Any) -> IntArray:
    return np.asarray(values, dtype=np.int64)
