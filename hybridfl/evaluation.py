"""Three accuracies, always named: ``global``, ``clients``, ``served``, and ``validation`` for choosing.

``global`` is the global model on the server's test set, ``clients`` each client's served model on its own test set,
``served`` the clients' models on the server's test set. A scope may go into detail: ``/domain=NAME`` where the test part has
several, ``/task=3`` and ``/tasks`` (the mean over tasks) in a stream of tasks, ``/width=0.25`` and ``/model=NAME`` where the
method serves several widths or has alternatives. ``held_out`` is ``clients`` for those that never train, which the other
scopes leave out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from hybridfl.build import NonNegativeInt, PositiveInt
from hybridfl.data.dataset import Dataset
from hybridfl.deployment import Deployment
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.kept import Kept
from hybridfl.rng import stream
from hybridfl.scoring import Index, Scored, ScoredSet, identity, size
from hybridfl.types import SERVER, Method, Served, State


@dataclass(frozen=True)
class Evaluation:
    """How models are scored.

    Attributes:
        min_test: least number of test examples of a client.
        sample: personal models scored on the whole test part; the last round of a task, and of the run, scores all.
        chunk: examples a forward pass takes at once.
        limit: test examples that there are, evenly spaced in the order of the test part; ``None`` is all.
    """

    min_test: PositiveInt = 50
    sample: NonNegativeInt = 20
    chunk: PositiveInt = 1000
    limit: PositiveInt | None = None

    def limited(self, dataset: Dataset) -> Dataset:
        """With as many test examples as there are to be.

        Raises:
            ConfigError: there are fewer; key ``evaluation.limit``.
        """
        number = len(dataset.test)
        if self.limit is None:
            return dataset
        if self.limit > number:
            problem = f"got {self.limit}: the test part has {number} examples; nearest valid value: {number}."
            raise ConfigError("evaluation.limit", problem)
        return replace(dataset, test=dataset.test.at(np.arange(self.limit) * number // self.limit))


Row = dict[str, Any]
Personal = Mapping[int, list[Served]]


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


class Evaluator:
    """Scores what a method serves, without ever training or selecting on test data."""

    def __init__(self, federation: Federation, method: Method, options: Evaluation) -> None:
        self.federation, self.method, self.options = federation, method, options

    def score(self, state: State, round: int, last: bool, kept: Kept | None = None) -> Scores:
        """Rows of all scopes that are defined for this method after ``round`` rounds.

        Args:
            last: whether the round is the last of the run or of its task.
            kept: what participants have kept to themselves; then there is no global model.
        """
        return _Evaluation(self, state, round, last, kept or {}).scores()


class _Evaluation:
    """One evaluation under way: the test part, and what has been scored on it so far."""

    def __init__(self, evaluator: Evaluator, state: State, round: int, last: bool, kept: Kept) -> None:
        self.federation, self.method, self.options = evaluator.federation, evaluator.method, evaluator.options
        self.state, self.round, self.last = state, round, last
        self.deployment = Deployment(self.federation, kept, round)
        self.seen = self.federation.tasks.labels("seen", round - 1)
        self.test = ScoredSet(self.federation, *self.federation.test, self.seen)
        self.rows: list[Row] = []

    def scores(self) -> Scores:
        shared = self.deployed(SERVER)
        if shared:
            self.whole("global", [shared])
        personal = self.personal(self.deployed)
        trainers = set(self.federation.clients.trainers(self.federation.seed))
        training = {k: ensemble for k, ensemble in personal.items() if k in trainers}
        clients = self.clients("clients", training)
        clients |= self.clients("held_out", {k: e for k, e in personal.items() if k not in trainers})
        self.served(training)
        self.widths(trainers)
        self.alternatives(clients)
        self.validation(shared, personal)
        return Scores(self.rows, list(clients.values()))

    def deployed(self, participant: int, width: float | None = None) -> list[Served]:
        """What a participant would deploy, ready to run."""
        # Not every method has widths, and only one that has is asked for them.
        asked = () if width is None else (width,)
        return self.deployment.ready(self.method.serve(self.state, participant, *asked), participant)

    def personal(self, serve: Callable[[int], list[Served]]) -> Personal:
        served = {k: serve(k) for k in range(self.federation.clients.number) if len(self.own[k])}
        return {k: ensemble for k, ensemble in served.items() if ensemble}

    @cached_property
    def own(self) -> list[np.ndarray]:
        """Every client's test examples of the classes seen so far."""
        sets, y = self.federation.split.clients_test, self.federation.dataset.test.y
        return [index if self.seen is None else index[np.isin(y[index], self.seen)] for index in sets]

    @cached_property
    def parts(self) -> list[tuple[str, Index]]:
        """What is scored of the test part, by the ending of the scope: the server's test set first."""
        test, split, tasks = self.federation.dataset.test, self.federation.split, self.federation.tasks
        everything = np.arange(len(test)) if split.server_test is None else split.server_test
        seen = np.arange(len(test)) if self.seen is None else np.flatnonzero(np.isin(test.y, self.seen))
        parts = [("", np.intersect1d(everything, seen))]
        names = self.federation.dataset.domains
        if len(names) > 1:
            parts += [(f"/domain={name}", seen[test.domain[seen] == d]) for d, name in enumerate(names)]
        if len(tasks) > 1:
            within = parts[0][1]
            for number in range(tasks.at(self.round - 1) + 1):
                parts.append((f"/task={number}", within[np.isin(test.y[within], tasks.classes[number])]))
        return [(name, index) for name, index in parts if len(index)]

    def whole(self, scope: str, ensembles: list[list[Served]]) -> None:
        """Rows of models, or of the mean over models, on the server's test set and its parts."""
        scored = [self.test.scored(ensemble) for ensemble in ensembles]
        sizes = [size(self.federation, ensemble) for ensemble in ensembles]
        by_task: list[Row] = []
        for name, index in self.parts:
            accuracies, losses = np.array([found.at(index) for found in scored]).T
            row = _row(f"{scope}{name}", float(accuracies.mean()), float(losses.mean()), self.test.count(index), sizes)
            row |= {"spread": float(accuracies.std())} if scope == "served" else {}
            self.rows.append(row)
            by_task += [row] if name.startswith("/task=") else []
        if by_task:
            accuracy, loss = (float(np.mean([row[key] for row in by_task])) for key in ("accuracy", "loss"))
            self.rows.append(_row(f"{scope}/tasks", accuracy, loss, sum(row["examples"] for row in by_task), sizes))

    def clients(self, scope: str, personal: Personal) -> dict[int, Row]:
        """Rows over clients, and one for each."""
        if not personal:
            return {}
        users = Counter(identity(ensemble) for ensemble in personal.values())
        # A model of one client alone is run over that client's examples only, unless it was run over all already.
        scored = {
            k: self.test.some(ensemble, self.own[k], alone=users[identity(ensemble)] == 1)
            for k, ensemble in personal.items()
        }
        sizes = [size(self.federation, ensemble) for ensemble in personal.values()]
        scores = {k: _Score(*found.at(slice(None)), len(self.own[k])) for k, found in scored.items()}
        self.rows.append(_over_clients(scope, list(scores.values()), sizes))
        self.domains(scope, scored, sizes)
        return {k: {"client": k, **score._asdict()} for k, score in scores.items()}

    def domains(self, scope: str, scored: Mapping[int, Scored], sizes: list[tuple[int, int]]) -> None:
        domain, names = self.federation.dataset.test.domain, self.federation.dataset.domains
        for d, name in enumerate(names if len(names) > 1 else ()):
            inside = {k: np.flatnonzero(domain[self.own[k]] == d) for k in scored}
            of = [_Score(*scored[k].at(index), len(index)) for k, index in inside.items() if len(index)]
            if of:
                self.rows.append(_over_clients(f"{scope}/domain={name}", of, sizes))

    def served(self, personal: Personal) -> None:
        if not personal:
            return
        chosen = sorted(personal)
        distinct = len({identity(ensemble) for ensemble in personal.values()})
        if not self.last and distinct > self.options.sample:
            order = stream(self.federation.seed, "evaluation sample", self.round).permutation(len(chosen))
            chosen = sorted(chosen[i] for i in order[: self.options.sample])
        if chosen:
            self.whole("served", [personal[k] for k in chosen])

    def widths(self, trainers: set[int]) -> None:
        for width in self.method.widths:
            shared = self.deployed(SERVER, width)
            if shared:
                self.whole(f"global/width={width:g}", [shared])
            personal = self.personal(partial(self.deployed, width=width))
            self.clients(f"clients/width={width:g}", {k: e for k, e in personal.items() if k in trainers})

    def alternatives(self, clients: dict[int, Row]) -> None:
        """Rows of the participants' other models, and columns beside the clients' own rows."""
        for name in self.method.alternatives:
            found = self.clients(f"clients/model={name}", self.personal(partial(self.alternative, name)))
            for client, row in found.items():
                if client in clients:
                    mine = clients[client]
                    mine |= {f"accuracy_{name}": row["accuracy"], f"loss_{name}": row["loss"]}
                    mine[f"benefit_{name}"] = row["loss"] - mine["loss"]

    def alternative(self, name: str, client: int) -> list[Served]:
        ask: Callable[[str, State, int], list[Served]] = self.method.alternative  # type: ignore[attr-defined]
        return self.deployment.ready(ask(name, self.state, client), client)

    def validation(self, shared: list[Served], personal: Personal) -> None:
        """``validation``: the global model on the server's validation examples if it has labelled ones, else on the
        union of the clients'; without a global model that of ``validation/clients``: each client's own model on its own.
        """
        owned = {k: self.federation.owned(k, "val") for k in range(self.federation.clients.number)}
        server = self.federation.split.server_val
        labelled = len(server) > 0 and "server_labels" in self.federation.provides
        everybody = server if labelled else np.concatenate(list(owned.values()))
        if shared:
            self.add_validation("validation", [(shared, everybody)])
        if any(identity(ensemble) != identity(shared) for ensemble in personal.values()):
            scope = "validation/clients" if shared else "validation"
            self.add_validation(scope, [(ensemble, owned[k]) for k, ensemble in personal.items()])

    def add_validation(self, scope: str, parts: list[tuple[list[Served], np.ndarray]]) -> None:
        bench, right, lost, count = self.federation.bench, 0.0, 0.0, 0
        for ensemble, positions in parts:
            if self.seen is not None:
                positions = positions[np.isin(self.federation.pool.y[positions], self.seen)]
            if len(positions) == 0:
                continue
            index = torch.from_numpy(positions).to(bench.x.device)
            found = ScoredSet(self.federation, bench.x[index], bench.y[index], self.seen).scored(ensemble)
            accuracy, loss = found.at(slice(None))
            right, lost, count = right + accuracy * len(index), lost + loss * len(index), count + len(index)
        if count:
            self.rows.append(_row(scope, right / count, lost / count, count))


def _over_clients(scope: str, scores: list[_Score], sizes: list[tuple[int, int]]) -> Row:
    """Mean, worst tenth and spread over clients."""
    accuracies = np.array([score.accuracy for score in scores])
    worst = np.sort(accuracies)[: math.ceil(len(accuracies) / 10)]
    loss = float(np.mean([score.loss for score in scores]))
    row = _row(scope, float(accuracies.mean()), loss, sum(score.examples for score in scores), sizes)
    return row | {"worst10": float(worst.mean()), "spread": float(accuracies.std())}


def _row(scope: str, accuracy: float, loss: float, examples: int, sizes: list[tuple[int, int]] | None = None) -> Row:
    """A row of ``metrics.csv``; parameters and operations are means over the models scored."""
    row: Row = {"scope": scope, "accuracy": accuracy, "loss": loss, "examples": examples}
    if sizes:
        parameters, macs = np.array(sizes, dtype=np.float64).mean(0).tolist()
        row |= {"parameters": round(parameters), "inference_macs": round(macs)}
    return row
