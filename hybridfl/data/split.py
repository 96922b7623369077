"""The split of a run: the server's share, the clients' shares, their validation views and test sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridfl.data.dataset import Dataset, IntArray
from hybridfl.data.partitioning import Partition, Partitioning
from hybridfl.data.server_data import ServerData
from hybridfl.errors import ConfigError, DataError
from hybridfl.rng import stream


@dataclass(frozen=True, eq=False)
class Split:
    """Who owns which examples. All arrays are sorted int64 indices.

    Attributes:
        clients_train, clients_val: one array per client, into the data set's train part. Disjoint between clients, and
            with the server's.
        clients_test: one array per client, into the data set's *test* part; those of two clients may overlap.
        server_train, server_val: into the train part; empty without server data. The server's test set is the whole
            test part and is not stored.
        class_counts: ``(clients, classes)``, examples of each class that a client owns for training and validation.
        moved: examples that changed hands so that every client has the minimum.

    A partitioning may leave examples to nobody; otherwise the train part is dealt out completely.
    """

    clients_train: tuple[IntArray, ...]
    clients_val: tuple[IntArray, ...]
    clients_test: tuple[IntArray, ...]
    server_train: IntArray
    server_val: IntArray
    class_counts: IntArray
    moved: int = 0

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

    def to_json(self) -> dict[str, Any]:
        """Plain containers for ``json.dump``; ``sizes`` and ``class_counts`` are there for the reader's eye."""
        clients = [
            {
                "sizes": {"train": len(train), "val": len(val), "test": len(test)},
                "class_counts": counts.tolist(),
                "train": train.tolist(),
                "val": val.tolist(),
                "test": test.tolist(),
            }
            for train, val, test, counts in zip(
                self.clients_train, self.clients_val, self.clients_test, self.class_counts, strict=True
            )
        ]
        server = {
            "sizes": {"train": len(self.server_train), "val": len(self.server_val)},
            "train": self.server_train.tolist(),
            "val": self.server_val.tolist(),
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
                moved=int(stored["moved"]),
            )
            digest = stored["digest"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"stored split: damaged ({type(error).__name__}: {error}); draw it again.") from error
        if split.digest != digest:
            raise DataError(f"stored split: its digest is {digest}, its indices have {split.digest}; draw it again.")
        return split


def draw_split(
    dataset: Dataset,
    partitioning: Partitioning,
    server_data: ServerData,
    clients: int,
    client_validation: float,
    min_test: int,
    seed: int,
) -> Split:
    """The server's share first, then the rest to the clients; then validation views and the clients' test sets.

    A partitioning that names its examples itself (``before_server``) goes before the server.

    Args:
        dataset: of which ``train`` is dealt out and ``test`` serves the test sets.
        clients: their number.
        client_validation: fraction of each client's examples that is held out; rounded, and never all of them.
        min_test: size that a client's test set has at least, as far as the test part has the examples.
        seed: the run's; ``partitioning.seed`` goes before it. Every stream has a key of its own, so one client's
            validation view does not depend on another's.

    Raises:
        ConfigError: more clients than examples, or an option of the two nodes does not fit.
        DataError: the test part has none of a client's classes.
    """
    seed = seed if partitioning.seed is None else partitioning.seed
    y = dataset.train.y
    if getattr(partitioning, "before_server", False):
        partition = _partition(partitioning, y, clients, seed, 0)
        owned = partition.shares
        server = _leftovers(partition, server_data, y, dataset.classes, seed)
    else:
        server = _servers_share(server_data, y, dataset.classes, seed)
        rest = np.setdiff1d(np.arange(len(y)), server)
        partition = _partition(partitioning, y[rest], clients, seed, len(server))
        owned = [rest[share] for share in partition.shares]
    views = [
        _hold_out(share, y, client_validation, stream(seed, "validation", client)) for client, share in enumerate(owned)
    ]
    server_train, server_val = _hold_out(server, y, server_data.validation, stream(seed, "validation", "server"))
    counts = np.array([np.bincount(y[share], minlength=dataset.classes) for share in owned], dtype=np.int64)
    return Split(
        clients_train=tuple(train for train, _ in views),
        clients_val=tuple(val for _, val in views),
        clients_test=_test_sets(dataset, counts, min_test, seed),
        server_train=server_train,
        server_val=server_val,
        class_counts=counts,
        moved=partition.moved,
    )


def _servers_share(server_data: ServerData, y: IntArray, classes: int, seed: int) -> IntArray:
    try:
        return server_data.take(y, classes, stream(seed, "server_data"))
    except ConfigError as error:
        raise error.under("server_data") from error


def _leftovers(partition: Partition, server_data: ServerData, y: IntArray, classes: int, seed: int) -> IntArray:
    """The server's share of what the clients leave.

    Raises:
        ConfigError: the server wants more than that, or leaves something and the partition should be complete.
    """
    left = np.setdiff1d(np.arange(len(y)), np.concatenate(partition.shares))
    try:
        server = left[_servers_share(server_data, y[left], classes, seed)]
    except ConfigError as error:
        if not len(left):
            problem = f"the partitioning gives all {len(y)} training examples to clients; use server_data=none."
            raise ConfigError("server_data", problem) from error
        told = f"{error.problem.removesuffix('.')} (what the partitioning leaves of {len(y)})."
        raise ConfigError(error.key, told) from error
    if partition.complete and len(server) < len(left):
        nobodys = f"got true, and {len(left) - len(server)} training examples belong to no client and not to the server"
        way_out = "false leaves them out, server_data=share server_data.fraction=1 gives them to the server"
        raise ConfigError("partitioning.complete", f"{nobodys}; {way_out}.")
    return server


def _partition(partitioning: Partitioning, y: IntArray, clients: int, seed: int, servers: int) -> Partition:
    if clients < 1:
        raise ConfigError("clients.number", f"got {clients}: must be at least 1; nearest valid value: 1.")
    if not len(y):
        raise ConfigError("server_data", f"the server takes all {servers} training examples; leave some for clients.")
    if clients > len(y):
        after = f" after the server took {servers}" if servers else ""
        raise ConfigError(
            "clients.number",
            f"got {clients}: there are {len(y)} training examples{after}; the largest valid value is {len(y)}.",
        )
    try:
        partition = partitioning.split(y, clients, stream(seed, "partitioning"))
    except ConfigError as error:
        raise error.under("partitioning") from error
    _check(partition, len(y), clients, partitioning)
    return partition


def _check(partition: Partition, examples: int, clients: int, partitioning: Partitioning) -> None:
    # A user's own class may stand behind the node, and a wrong partition would only show as a wrong result.
    name = type(partitioning).__name__
    if len(partition.shares) != clients or not all(len(share) for share in partition.shares):
        raise ConfigError("partitioning", f"{name}.split must give each of the {clients} clients an example or more.")
    dealt, every = np.sort(np.concatenate(partition.shares)), np.arange(examples)
    if getattr(partitioning, "before_server", False):
        if len(np.unique(dealt)) < len(dealt) or len(np.setdiff1d(dealt, every)):
            raise ConfigError("partitioning", f"{name}.split must deal out no example twice, of 0 to {examples - 1}.")
    elif not np.array_equal(dealt, every):
        raise ConfigError("partitioning", f"{name}.split must deal out each of the {examples} examples exactly once.")


def _hold_out(owned: IntArray, y: IntArray, fraction: float, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Train and validation part of an owner's examples, with the same class proportions up to rounding."""
    size = min(_nearest(fraction * len(owned)), max(0, len(owned) - 1))
    labels, counts = np.unique(y[owned], return_counts=True)
    held = [
        rng.choice(owned[y[owned] == label], count, replace=False)
        for label, count in zip(labels, _apportion(size, counts, rng), strict=True)
        if count
    ]
    val = _indices(np.sort(np.concatenate(held)) if held else [])
    return np.setdiff1d(owned, val), val


def _test_sets(dataset: Dataset, counts: IntArray, min_test: int, seed: int) -> tuple[IntArray, ...]:
    y = dataset.test.y
    pools = [np.flatnonzero(y == label) for label in range(dataset.classes)]
    available = np.array([len(pool) for pool in pools])
    sets = []
    for client, owned in enumerate(counts):
        share = owned.sum() / counts.sum()
        proportions = np.where(available > 0, owned, 0)  # a class without test examples cannot be tested
        if not proportions.any():
            held = np.flatnonzero(owned).tolist()
            raise DataError(f"{dataset.name}: the test part has no example of the classes {held} of client {client}.")
        # The largest size at which every class's part, rounded up, is still there.
        most = min(int(a) * int(proportions.sum()) // int(p) for a, p in zip(available, proportions, strict=True) if p)
        size = min(max(min_test, 1, _nearest(share * len(y))), most)
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
