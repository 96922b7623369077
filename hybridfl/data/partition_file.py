"""A partitioning that somebody else made: indices in a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hybridfl.data.dataset import IntArray, Labels
from hybridfl.data.partitioning import Partition, sorted_indices
from hybridfl.errors import ConfigError


@dataclass(frozen=True)
class File:
    """The clients' examples as a file gives them: positions in the data set's training part, from 0.

    Two forms are read: a list with one list of positions for each client, or the ``split.json`` of a run, of which a client
    owns ``train`` and ``val`` together. What is held out is drawn anew: the same seed gives the run's own views again.
    ``class_counts`` in the file, if any, must be those of the data set, so that a file made for another one is noticed.

    The file goes before the server, which takes its share of the examples that the file leaves (``server_data.fraction`` is
    then a fraction of those). Who owns what does not depend on the run's seed, but the server's draw does.

    Args:
        path: the file, relative to the current folder; its contents, not its name, decide a run's numbers.
        complete: refuse examples that belong neither to a client nor to the server; ``False`` leaves them out of the run.
        seed: of the views; ``None`` is the run's.
    """

    before_server: ClassVar[bool] = True

    path: str | None = None
    complete: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.path is None:
            raise ConfigError(
                "path", "got null: name a JSON file, such as partitioning.path=outputs/runs/DIGEST/split.json."
            )

    @property
    def files(self) -> dict[str, Path]:
        return {"path": Path(str(self.path)).expanduser()}

    def split(self, labels: Labels, clients: int, rng: np.random.Generator) -> Partition:
        """As :class:`Partitioning` says, with ``y`` of all training examples."""
        y = labels.y
        stored = self._read()
        if len(stored) != clients:
            raise self._wrong(f"has {len(stored)} clients and clients.number is {clients}; set it to {len(stored)}")
        shares = [self._positions(client, given, len(y)) for client, given in enumerate(stored)]
        owner = np.full(len(y), -1)
        for client, share in enumerate(shares):
            if len(taken := share[owner[share] >= 0]):
                raise self._wrong(f"gives example {taken[0]} to client {owner[taken[0]]} and to client {client}")
            owner[share] = client
        self._check_counts(stored, shares, y)
        return Partition(shares, complete=self.complete)

    def _read(self) -> list[Any]:
        try:
            stored = json.loads(self.files["path"].read_text(encoding="utf-8"))
        except OSError as error:
            raise self._wrong(f"cannot be read ({error.strerror or error})") from error
        except (ValueError, RecursionError) as error:  # not text, or not JSON
            raise self._wrong(f"is no JSON ({error})") from error
        clients = stored.get("clients") if isinstance(stored, Mapping) else stored
        if not isinstance(clients, list) or not clients:
            raise self._wrong("holds neither a list of lists of positions nor a run's split.json")
        return clients

    def _positions(self, client: int, given: Any, examples: int) -> IntArray:
        if isinstance(given, Mapping):
            train, val = given.get("train"), given.get("val", [])
            given = [*train, *val] if isinstance(train, list) and isinstance(val, list) else None
        # A bool is an int to Python, and true is no position.
        if not isinstance(given, list) or not all(type(position) is int for position in given):
            raise self._wrong(f"gives client {client} something other than a list of whole numbers")
        if not given:
            raise self._wrong(f"gives client {client} no example; each needs one or more")
        for position in given:
            if not 0 <= position < examples:
                nearest = min(max(position, 0), examples - 1)
                problem = f"gives client {client} example {position}, and there are {examples} training examples"
                raise self._wrong(f"{problem}, 0 to {examples - 1}; the nearest valid position is {nearest}")
        share = sorted_indices(np.array(given, dtype=np.int64))
        if len(twice := share[1:][np.diff(share) == 0]):
            raise self._wrong(f"gives client {client} example {twice[0]} twice")
        return share

    def _check_counts(self, stored: list[Any], shares: list[IntArray], y: IntArray) -> None:
        for client, (given, share) in enumerate(zip(stored, shares, strict=True)):
            counts = given.get("class_counts") if isinstance(given, Mapping) else None
            if counts is None:
                continue
            found = np.bincount(y[share], minlength=len(counts) if isinstance(counts, list) else 0).tolist()
            if counts != found:
                problem = f"says that client {client} has {counts} examples of the classes, but in this data set it has"
                raise self._wrong(f"{problem} {found}: it belongs to another data set or was damaged")

    def _wrong(self, problem: str) -> ConfigError:
        return ConfigError("path", f"'{self.path}' {problem}.")
