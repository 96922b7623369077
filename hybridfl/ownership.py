"""Who owns what, as a table for the terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from hybridfl.behaviour import Role
from hybridfl.data.dataset import IntArray
from hybridfl.data.split import Drawn

ROWS = 20
"""Clients shown before the table is cut."""
COLUMNS = 20
"""Classes with a column each; of more, the table tells how many an owner has and which is the largest."""


def ownership(drawn: Drawn, roles: Mapping[int, Role], rows: int | None = ROWS) -> str:
    """Sizes, domains and classes of the server and the first ``rows`` clients (``None``: all), as lines of text."""
    dataset, split, pool = drawn.dataset, drawn.split, drawn.pool
    clients = len(split.clients_train)
    each = dataset.classes <= COLUMNS
    table = Table(title="Training examples by owner and class", title_justify="left")
    table.add_column("owner")
    if len(drawn.domains) > 1:
        table.add_column("domains")
    for name in ("train", "val", "test", *(map(str, range(dataset.classes)) if each else ("classes", "largest class"))):
        table.add_column(name, justify="right")

    def add(name: str, train: IntArray, val: IntArray, test: int, labelled: bool = True) -> None:
        both = np.concatenate([train, val])
        counts = np.bincount(pool.y[both], minlength=dataset.classes) if labelled else np.empty(0, dtype=np.int64)
        cells = [len(train), len(val), test, *(counts if each or not labelled else [np.count_nonzero(counts)])]
        largest = [f"{counts.argmax()}: {counts.max()}"] if labelled and not each else []
        domains = [_domains(drawn.domains, pool.domain[both])] if len(drawn.domains) > 1 else []
        table.add_row(name, *domains, *(str(n) if n else "·" for n in cells), *largest)

    if len(split.server_train):
        tested = len(dataset.test) if split.server_test is None else len(split.server_test)
        labels = labels_of(drawn)
        name = "server" if labels == "labelled" else f"server ({labels})"
        add(name, split.server_train, split.server_val, tested, labels == "labelled")
    shown = clients if rows is None else min(rows, clients)
    for client in range(shown):
        name = f"{client} ({roles[client].replace('_', ' ')})" if client in roles else str(client)
        add(name, split.clients_train[client], split.clients_val[client], len(split.clients_test[client]))
    if shown < clients:
        table.caption = f"and {clients - shown} more clients"
    console = Console(width=10_000, record=True, file=io.StringIO(), highlight=False)
    console.width = max(
        40, console.measure(table).maximum
    )  # a narrow terminal may break lines, not the table its cells
    console.print(table)
    return console.export_text().rstrip()


def labels_of(drawn: Drawn) -> Literal["labelled", "own labels", "unlabelled"]:
    """What the server knows of its examples: labels of the clients' task, of a task of its own, or none."""
    if "server_labels" in drawn.provides:
        return "labelled"
    return "own labels" if "server_own_labels" in drawn.provides else "unlabelled"


def _domains(names: Sequence[str], domain: IntArray) -> str:
    """The domains of some examples, the commonest first; how many have each, if there are several."""
    counts = np.bincount(domain, minlength=len(names))
    order = [d for d in np.argsort(-counts, kind="stable") if counts[d]]
    return ", ".join(names[d] if len(order) == 1 else f"{names[d]} {counts[d]}" for d in order)
