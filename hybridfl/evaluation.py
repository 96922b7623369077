"""Three accuracies, always named: ``global``, ``clients``, ``served``, and ``validation`` for choosing.

Where the test part has several domains, each of the three also comes as ``/domain=NAME``. Each distinct served model is run once over the test part and scored by index.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridfl.build import NonNegativeInt, PositiveInt
from hybridfl.federation import Federation
from hybridfl.local import predict
from hybridfl.rng import stream
from hybridfl.types import SERVER, Method, Served, State


@dataclass(frozen=True)
class Evaluation:
    """How models are scored.

    Attributes:
        min_test: least number of test examples of a client.
        sample: personal models scored on the whole test part before the last round, which scores all.
        chunk: examples a forward pass takes at once.
    """

    min_test: PositiveInt = 50
    sample: NonNegativeInt = 20
    chunk: PositiveInt = 1000


Row = dict[str, Any]
Index = np.ndarray | slice


@dataclass(frozen=True)
class Scores:
    """Rows of ``metrics.csv`` without costs, and of ``clients.csv``."""

    rows: list[Row]
    clients: list[Row]

    def accuracy(self) -> float | None:
        """The figure to show while a run works: of the global model, else of the clients' models."""
        by_scope = {row["scope"]: row["accuracy"] for row in self.rows}
        return by_scope.get("global", by_scope.get("clients"))


class _Score(NamedTuple):
    """Of one client on its own test set."""

    accuracy: float
    loss: float
    examples: int


@dataclass(frozen=True, eq=False)
class _Scored:
    """Right or wrong, and loss, of every example of a set."""

    correct: np.ndarray
    loss: np.ndarray

    def at(self, index: Index) -> tuple[float, float]:
        """Mean accuracy and loss at these positions."""
        return float(self.correct[index].mean()), float(self.loss[index].mean())


class Evaluator:
    """Scores what a method serves, without ever training or selecting on test data."""

    def __init__(self, federation: Federation, method: Method, options: Evaluation) -> None:
        self.federation, self.method, self.options = federation, method, options

    def score(self, state: State, round: int, last: bool) -> Scores:
        """Rows of all scopes that are defined for this method after ``round`` rounds."""
        test = _Set(self.federation, *self.federation.test)
        rows: list[Row] = []
        shared = self.method.serve(state, SERVER)
        if shared:
            scored = test.scored(shared)
            rows += [_row(f"global{name}", *scored.at(index), test.count(index)) for name, index in self._parts]
        personal = self._personal(state)
        clients = self._clients(personal, test, rows)
        self._served(personal, test, round, last, rows)
        self._validation(shared, personal, rows)
        return Scores(rows, clients)

    @cached_property
    def _parts(self) -> list[tuple[str, Index]]:
        """What is scored of the test part, by the ending of the scope: the server's test set, then every domain."""
        whole = self.federation.split.server_test
        parts: list[tuple[str, Index]] = [("", slice(None) if whole is None else whole)]
        domain, names = self.federation.dataset.test.domain, self.federation.dataset.domains
        if len(names) > 1:
            parts += [(f"/domain={name}", np.flatnonzero(domain == d)) for d, name in enumerate(names)]
        return [(name, index) for name, index in parts if isinstance(index, slice) or len(index)]

    def _personal(self, state: State) -> dict[int, list[Served]]:
        served = {k: self.method.serve(state, k) for k in range(self.federation.clients.number)}
        return {k: ensemble for k, ensemble in served.items() if ensemble}

    def _clients(self, personal: dict[int, list[Served]], test: _Set, rows: list[Row]) -> list[Row]:
        if not personal:
            return []
        own = self.federation.split.clients_test
        users = Counter(_identity(ensemble) for ensemble in personal.values())
        # A model of one client alone is run over that client's examples only, unless it was run over all already.
        scored = {
            k: test.some(ensemble, own[k], alone=users[_identity(ensemble)] == 1) for k, ensemble in personal.items()
        }
        scores = {k: _Score(*found.at(slice(None)), len(own[k])) for k, found in scored.items()}
        rows.append(_over_clients("clients", list(scores.values())))
        domain, names = self.federation.dataset.test.domain, self.federation.dataset.domains
        for d, name in enumerate(names if len(names) > 1 else ()):
            inside = {k: np.flatnonzero(domain[own[k]] == d) for k in personal}
            of = [_Score(*scored[k].at(index), len(index)) for k, index in inside.items() if len(index)]
            if of:
                rows.append(_over_clients(f"clients/domain={name}", of))
        return [{"client": k, **score._asdict()} for k, score in scores.items()]

    def _served(self, personal: dict[int, list[Served]], test: _Set, round: int, last: bool, rows: list[Row]) -> None:
        if not personal:
            return
        chosen = sorted(personal)
        distinct = len({_identity(ensemble) for ensemble in personal.values()})
        if not last and distinct > self.options.sample:
            order = stream(self.federation.seed, "evaluation sample", round).permutation(len(chosen))
            chosen = sorted(chosen[i] for i in order[: self.options.sample])
        if not chosen:
            return
        scored = [test.scored(personal[k]) for k in chosen]
        for name, index in self._parts:
            accuracies, losses = np.array([found.at(index) for found in scored]).T
            row = _row(f"served{name}", float(accuracies.mean()), float(losses.mean()), test.count(index))
            rows.append(row | {"spread": float(accuracies.std())})

    def _validation(self, shared: list[Served], personal: dict[int, list[Served]], rows: list[Row]) -> None:
        """``validation``: the global model on the server's validation examples if it has labelled ones, else on the
        union of the clients'; without a global model that of ``validation/clients``: each client's own model on its own.
        """
        owned = {k: self.federation.owned(k, "val") for k in range(self.federation.clients.number)}
        server = self.federation.split.server_val
        labelled = len(server) > 0 and "server_labels" in self.federation.provides
        everybody = server if labelled else np.concatenate(list(owned.values()))
        if shared:
            self._add_validation("validation", [(shared, everybody)], rows)
        if any(_identity(ensemble) != _identity(shared) for ensemble in personal.values()):
            scope = "validation/clients" if shared else "validation"
            self._add_validation(scope, [(ensemble, owned[k]) for k, ensemble in personal.items()], rows)

    def _add_validation(self, scope: str, parts: list[tuple[list[Served], np.ndarray]], rows: list[Row]) -> None:
        bench, right, lost, count = self.federation.bench, 0.0, 0.0, 0
        for ensemble, positions in parts:
            if len(positions) == 0:
                continue
            index = torch.from_numpy(positions).to(bench.x.device)
            accuracy, loss = _Set(self.federation, bench.x[index], bench.y[index]).scored(ensemble).at(slice(None))
            right, lost, count = right + accuracy * len(index), lost + loss * len(index), count + len(index)
        if count:
            rows.append(_row(scope, right / count, lost / count, count))


class _Set:
    """A set of examples and the scores of the models that were run over it."""

    def __init__(self, federation: Federation, x: Tensor, y: Tensor) -> None:
        self.federation, self.x, self.y = federation, x, y
        self.size = len(y)
        self._whole: dict[tuple[Any, ...], _Scored] = {}
        # Identities are addresses: keeping what was scored alive keeps them unique.
        self._kept: list[list[Served]] = []

    def scored(self, ensemble: list[Served]) -> _Scored:
        """Scores by position, computed once for each distinct model."""
        key = _identity(ensemble)
        if key not in self._whole:
            self._whole[key] = self._run(ensemble, self.x, self.y)
            self._kept.append(ensemble)
        return self._whole[key]

    def some(self, ensemble: list[Served], index: np.ndarray, alone: bool) -> _Scored:
        """Scores at these positions; with ``alone`` no other position is run."""
        if alone and _identity(ensemble) not in self._whole:
            rows = torch.from_numpy(index).to(self.x.device)
            return self._run(ensemble, self.x[rows], self.y[rows])
        whole = self.scored(ensemble)
        return _Scored(whole.correct[index], whole.loss[index])

    def count(self, index: Index) -> int:
        return self.size if isinstance(index, slice) else len(index)

    def _run(self, ensemble: Sequence[Served], x: Tensor, y: Tensor) -> _Scored:
        total = sum(served.weight for served in ensemble)
        chunk, net = self.federation.chunk, self.federation.net
        mixed = sum(
            (predict(net, served.model, x, chunk) * (served.weight / total) for served in ensemble[1:]),
            predict(net, ensemble[0].model, x, chunk) * (ensemble[0].weight / total),
        )
        correct = (mixed.argmax(1) == y).double()
        loss = F.cross_entropy(mixed.double(), y, reduction="none")
        return _Scored(correct.cpu().numpy(), loss.cpu().numpy())


def _identity(ensemble: Sequence[Served]) -> tuple[Any, ...]:
    # Of the tensors, not of the dicts that hold them: a checkpoint keeps shared tensors shared, but not the dicts, and
    # a run that continues must find the same models distinct.
    return tuple(
        (*(tensor.data_ptr() for part in served.model for tensor in part.values()), served.weight)
        for served in ensemble
    )


def _over_clients(scope: str, scores: list[_Score]) -> Row:
    """Mean, worst tenth and spread over clients."""
    accuracies = np.array([score.accuracy for score in scores])
    worst = np.sort(accuracies)[: math.ceil(len(accuracies) / 10)]
    loss = float(np.mean([score.loss for score in scores]))
    row = _row(scope, float(accuracies.mean()), loss, sum(score.examples for score in scores))
    return row | {"worst10": float(worst.mean()), "spread": float(accuracies.std())}


def _row(scope: str, accuracy: float, loss: float, examples: int) -> Row:
    return {"scope": scope, "accuracy": accuracy, "loss": loss, "examples": examples}
