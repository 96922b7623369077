"""Dealing out the train part: the server's share, then the rest to the clients, and what must hold of both."""

from __future__ import annotations

import numpy as np

from hybridfl.data.dataset import Dataset, IntArray, Labels, problem_of
from hybridfl.data.partition_domains import Domains
from hybridfl.data.partitioning import Partition, Partitioning
from hybridfl.data.server_data import Load, ServerData, ServerShare
from hybridfl.errors import ConfigError
from hybridfl.rng import stream
from hybridfl.tasks import TaskStream


def deal(
    dataset: Dataset,
    partitioning: Partitioning,
    server_data: ServerData,
    clients: int,
    seed: int,
    load: Load,
    tasks: TaskStream,
) -> tuple[ServerShare, list[IntArray], int]:
    """The server's share, each client's examples, and how many of these changed hands.

    Args:
        seed, load, tasks: see :func:`hybridfl.data.split.draw_split`.

    Raises:
        ConfigError: more clients than examples, an option of the two nodes does not fit, or somebody has no example of a
            task.
    """
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
    return server, owned, partition.moved


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
