"""Who owns what, as a table for the terminal."""

from __future__ import annotations

import io
from collections.abc import Collection

import numpy as np
from rich.console import Console
from rich.table import Table

from hybridfl.data.dataset import Dataset, IntArray
from hybridfl.data.split import Split

ROWS = 20
"""Clients shown before the table is cut."""
COLUMNS = 20
"""Classes with a column each; of more, the table tells how many an owner has and which is the largest."""


def ownership(dataset: Dataset, split: Split, noisy: Collection[int] = (), rows: int | None = ROWS) -> str:
    """Sizes and classes of the server and the first ``rows`` clients (``None``: all), as lines of text."""
    clients = len(split.clients_train)
    each = dataset.classes <= COLUMNS
    table = Table(title="Training examples by owner and class", title_justify="left")
    table.add_column("owner")
    for name in ("train", "val", "test", *(map(str, range(dataset.classes)) if each else ("classes", "largest class"))):
        table.add_column(name, justify="right")

    def add(name: str, train: IntArray, val: IntArray, test: int) -> None:
        counts = np.bincount(dataset.train.y[np.concatenate([train, val])], minlength=dataset.classes)
        cells = [len(train), len(val), test, *(counts if each else [np.count_nonzero(counts)])]
        largest = [] if each else [f"{counts.argmax()}: {counts.max()}"]
        table.add_row(name, *(str(n) if n else "·" for n in cells), *largest)

    if len(split.server_train):
        add("server", split.server_train, split.server_val, len(dataset.test))
    shown = clients if rows is None else min(rows, clients)
    for client in range(shown):
        name = f"{client} (noisy)" if client in noisy else str(client)
        add(name, split.clients_train[client], split.clients_val[client], len(split.clients_test[client]))
    if shown < clients:
        table.caption = f"and {clients - shown} more clients"
    console = Console(width=10_000, record=True, file=io.StringIO(), highlight=False)
    console.width = max(
        40, console.measure(table).maximum
    )  # a narrow terminal may break lines, not the table its cells
    console.print(table)
    return console.export_text().rstrip()
