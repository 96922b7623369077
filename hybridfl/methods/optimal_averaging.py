"""Optimal model averaging. Grimberg, Hartley, Karimireddy, Jaggi 2021, arXiv 2110.12946.

Every client deploys (1 - a) local + a global with a weight of its own. The paper has the theory for means of numbers
(:mod:`hybridfl.theory`) and leaves vectors open: the estimates for nets are this project's, see
:mod:`hybridfl.merging.averaging`.

The theory is about a local model that has converged. Few steps from the global model are an average with it already,
and then the right weight may be 0; hence the long local work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.build import Fraction, PositiveFloat, PositiveInt, Range
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.local import cross_entropy
from hybridfl.merging.atlas import segments
from hybridfl.merging.averaging import (
    Array,
    Granularity,
    Weights,
    blocks,
    jackknife,
    mixed,
    parabola,
    plug_in,
    pooled,
    squared,
)
from hybridfl.methods.personalised import Personal, Personalised
from hybridfl.parametrization import AtlasSpan
from hybridfl.params import Layout, Params
from hybridfl.probes import DiagonalFisher, gauss_newton, mean_loss
from hybridfl.types import Apply, Batch, Job, Method, Model, Part, ProbeInput, Result, Results, Round, State, View

Estimator = Literal["pooled", "jackknife", "split_half", "fisher", "val3", "grid", "oracle", "fixed"]
Variance = Literal["jackknife", "split_half", "fisher"]
Chosen = dict[int, tuple[Array, float | None]]
"""Client → its weights by block and the predicted benefit, if there is a prediction."""
READS: dict[str, Part] = {"val3": "val", "grid": "val", "oracle": "test"}
"""Estimators that choose by the loss on a part of the client's data."""


def part_loss(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """Cross-entropy over the examples of the batch that ``ctx["kept"]`` ``(n,)`` says; 0 where there are none."""
    index = ctx["kept"][batch.positions].nonzero().flatten()
    if not len(index):
        return torch.stack([0 * tensor.sum() for tensor in theta.values()]).sum()
    return cross_entropy(apply, theta, params, Batch(batch.x[index], batch.y[index], batch.positions[index]), ctx)


def told(seen: ProbeInput) -> Tensor:
    """What the participant has worked out and now sends."""
    statistics: Tensor = seen.ctx["statistics"]
    return statistics


class OptimalAveraging(Personalised):
    """After the base method's rounds every client mixes its local model with the global one, block by block.

    v, the local model's expected squared error, and D, its squared distance from the global one, give the weights:

    - ``pooled``: one variance between clients for all. Clients send v and D of each block, the server returns weights.
    - ``jackknife``, ``split_half``, ``fisher``: by the client's own v and D alone; nothing is sent.
    - ``val3``, ``grid``: by losses on the client's validation examples; a parabola through three, or the best of a grid.
      One weight for the whole model.
    - ``oracle``: the best of the grid by the loss on the client's own test examples, an upper bound.
    - ``fixed``: the same weight for all.

    The global model knows the client's own data. The base method's rounds have mixed it in many times, so that no single
    model of the client's could be taken off; therefore its share w = n_i/n of the examples of all clients that train is
    taken for the weight of its local model in the global one (F3), which is exact for one round of FedAvg with everybody
    whose clients do the same local work, and otherwise an approximation.

    Weights of normalisation layers are mixed, BatchNorm's statistics are those of the local model; at the weight 1 those
    of the global one (``model.batch_norm=reestimate`` takes them anew).

    ``variance``, ``bias`` and ``predicted`` in ``clients.csv`` are squared lengths in the metric; with ``gauss_newton``
    half of each is a loss, to second order. Where the weight comes from losses, ``predicted`` is a loss.

    Args:
        base, local_epochs, local_steps, every: as in :class:`hybridfl.methods.personalised.Personalised`.
        estimator: of the weights.
        variance: v of ``pooled``: ``jackknife``, from models trained like the local one, in its order, each without one
            of ``folds`` parts of the examples; ``split_half``, a quarter of the squared distance of two models trained on
            two halves; or ``fisher``, the diagonal estimate F / (n (F + ridge)²).
        folds: parts of ``jackknife``, at most the client's examples.
        ridge: of it; null is 1 / (lr · local steps), the strength at which early stopping resembles it.
        granularity: one weight for the ``model`` or for each ``layer``, a module's weight and bias.
        metric: in which v and D are measured: ``gauss_newton``, the curvature of the client's loss at the global model,
            in which half a squared length is an excess loss; ``identity``; or the diagonal ``fisher`` information at the
            local model. Curvature is not taken at the local model, since that is certain of every example it has seen,
            and so has almost none there.
        a_max: largest weight.
        weight: of ``fixed``.
        points: of the grid from 0 to 1.
        own_data: whether w is accounted for; without, w = 0.
    """

    client_columns = ("weight", "variance", "bias", "predicted")

    def __init__(
        self,
        base: Method,
        local_epochs: PositiveInt = 10,
        local_steps: PositiveInt | None = None,
        every: PositiveInt | None = None,
        estimator: Estimator = "pooled",
        variance: Variance = "jackknife",
        folds: Annotated[int, Range(low=2)] = 5,
        ridge: PositiveFloat | None = None,
        granularity: Granularity = "model",
        metric: Literal["gauss_newton", "identity", "fisher"] = "gauss_newton",
        a_max: Annotated[float, Range(above=0, high=1)] = 1.0,
        weight: Fraction = 0.5,
        points: Annotated[int, Range(low=2)] = 11,
        own_data: bool = True,
    ) -> None:
        super().__init__(base, local_epochs, local_steps, every)
        if estimator in READS and granularity != "model":
            problem = f"got {granularity}, but estimator={estimator} finds one weight; nearest valid value: model."
            raise ConfigError("granularity", problem)
        self.estimator, self.folds, self.ridge, self.metric = estimator, folds, ridge, metric
        self.granularity: Granularity = granularity
        self.plugs_in = estimator in ("pooled", *get_args(Variance))
        # An estimator of its own says how it estimates the variance.
        self.variance = variance if estimator == "pooled" else estimator
        if self.plugs_in and self.variance == "fisher" and metric == "gauss_newton":
            problem = "measures models, and a variance by fisher has none; nearest valid value: fisher."
            raise ConfigError("metric", f"got gauss_newton, which {problem}")
        self.a_max, self.weight, self.points, self.own_data = a_max, weight, points, own_data
        self.upper_bound = self.upper_bound or estimator == "oracle"

    def init(self, federation: Federation) -> State:
        state = super().init(federation)
        trainers, sizes = state["trainers"], state["sizes"]
        least = min(map(min, sizes), default=0)
        of_task = " of a task" if len(federation.tasks) > 1 else ""
        if self.plugs_in and len(trainers) < 2:
            problem = f"got {self.estimator}, which needs two clients that train; nearest valid value: fixed."
            raise ConfigError("estimator", problem)
        if self.plugs_in and self.variance != "fisher" and least < 2:
            key = "variance" if self.estimator == "pooled" else "estimator"
            problem = f"a client has {least} example{of_task}, which cannot be divided; nearest valid value: fisher."
            raise ConfigError(key, f"got {self.variance}, but {problem}")
        part = READS.get(self.estimator)
        if part and not all(all(federation.by_task(k, part)) for k in trainers):
            wanting = part == "val" and not of_task
            hint = "give clients.validation, such as clients.validation=0.2" if wanting else "try estimator=pooled"
            problem = f"got {self.estimator}, but a client has no examples in its '{part}' part{of_task}; {hint}."
            raise ConfigError("estimator", problem)
        shares = [[size / sum(task) if self.own_data else 0.0 for size in task] for task in sizes]
        return state | {"shares": shares}

    def personalise(
        self, state: State, shared: Model, now: Round
    ) -> Generator[list[Job], Results, Mapping[int, Personal]]:
        trainers: list[int] = state["trainers"]
        parts = self._parts(state, shared, now) if self.plugs_in and self.variance != "fisher" else []
        results = yield [*(self._local(k, shared, now) for k in trainers), *parts]
        local = {result.participant: result for result in results if result.tag == "local"}
        groups = blocks(shared.params, self.granularity)
        if self.plugs_in:
            errors = self._errors(local, results, parts, now)
            # A client whose training went astray has no estimate; it deploys the global model.
            local = {k: result for k, result in local.items() if k in errors}
            v, D = yield from self._measured(shared, local, errors, groups)
            found = yield from self._weights(state, shared, v, D, now)
            for k, weights in found.items():
                now.report("variance", float(v[k].sum()), k)
                now.report("bias", float(weights.bias.sum()), k)
            chosen: Chosen = {k: (weights.a, float(weights.benefit.sum())) for k, weights in found.items()}
        elif self.estimator == "fixed":
            chosen = {k: (np.full(len(groups), min(self.weight, self.a_max)), None) for k in local}
        else:
            chosen = yield from self._by_loss(shared, local)
        for k, (a, benefit) in chosen.items():
            now.report("weight", float(a.mean()), k)
            if benefit is not None:
                now.report("predicted", benefit, k)
        return {
            k: Personal(_mixture(local[k].model, shared, a, groups), local[k].model) for k, (a, _) in chosen.items()
        }

    def _local(self, client: int, shared: Model, now: Round) -> Job:
        wanted = self.plugs_in and "fisher" in (self.metric, self.variance)
        return self.job(client, shared, now, probes={"fisher": DiagonalFisher()} if wanted else {})

    def _parts(self, state: State, shared: Model, now: Round) -> list[Job]:
        """The local work on parts of the examples: as many epochs, and steps, as on the whole.

        The jackknife takes differences of models whose examples are nearly the same, so that the chance in the order of
        batches would weigh as much as they do: they all have the order of the local work.
        """
        device, jobs = next(iter(shared.params.values())).device, []
        for client, size in zip(state["trainers"], state["sizes"][now.task], strict=True):
            halves = self.variance == "split_half"
            folds = 2 if halves else min(self.folds, size)
            order = torch.from_numpy(now.rng("halves" if halves else "folds", client).permutation(size)) % folds
            for number in range(folds):
                ctx = {"kept": (order == number if halves else order != number).to(device)}
                tag, random_tag = (f"half {number}", None) if halves else (f"fold {number}", "local")
                more = {"loss": part_loss, "ctx": ctx, "held": frozenset(ctx), "tag": tag, "random_tag": random_tag}
                jobs.append(self.job(client, shared, now, **more))
        return jobs

    def _errors(
        self, local: Mapping[int, Result], results: Results, parts: list[Job], now: Round
    ) -> dict[int, list[Params]]:
        """Client → vectors whose squared lengths in the metric add up to v."""
        if self.variance == "fisher":
            return {k: [self._deviation(result, now)] for k, result in local.items()}
        wanted = Counter(job.participant for job in parts)
        models = {k: [r.model.params for r in results.of([k]) if r.tag != "local"] for k in local}
        return {k: jackknife(found) for k, found in models.items() if len(found) == wanted[k]}

    def _deviation(self, result: Result, now: Round) -> Params:
        ridge = self.ridge or 1 / (self.work(now).lr * result.steps)
        fisher: Params = result.probes["fisher"]
        return {n: f.sqrt() / (f + ridge) / result.examples**0.5 for n, f in fisher.items()}

    def _measured(
        self, shared: Model, local: Mapping[int, Result], errors: Mapping[int, list[Params]], groups: list[list[str]]
    ) -> Generator[list[Job], Results, tuple[dict[int, Array], dict[int, Array]]]:
        """v and D of every client's blocks, in the metric."""
        vectors = {k: [*errors[k], P.subtract(result.model.params, shared.params)] for k, result in local.items()}
        lengths: dict[int, Array] = {}
        if self.metric == "gauss_newton":
            for result in (yield [_curved(k, shared, found, len(groups)) for k, found in vectors.items()]):
                diagonal = result.probes["newton"]["matrix"].diagonal().double().cpu().numpy()
                lengths[result.participant] = diagonal.reshape(-1, len(groups))
        else:
            for k, found in vectors.items():
                metric = local[k].probes["fisher"] if self.metric == "fisher" else None
                lengths[k] = np.stack([squared(vector, metric, groups) for vector in found])
        return {k: rows[:-1].sum(0) for k, rows in lengths.items()}, {k: rows[-1] for k, rows in lengths.items()}

    def _weights(
        self, state: State, shared: Model, v: Mapping[int, Array], D: Mapping[int, Array], now: Round
    ) -> Generator[list[Job], Results, dict[int, Weights]]:
        sizes = dict(zip(state["trainers"], state["sizes"][now.task], strict=True))
        own = dict(zip(state["trainers"], state["shares"][now.task], strict=True))
        if self.estimator != "pooled":
            return {k: plug_in(v[k], D[k], own[k], self.a_max) for k in v}
        # The server learns v and D of everybody, and answers with the weights.
        note = {k: torch.from_numpy(np.stack([v[k], D[k]])) for k in v}
        yield [_message(k, shared, note[k], sent=True) for k in v]
        order = list(v)
        variances, distances = (np.stack([part[k] for k in order]) for part in (v, D))
        found = pooled(variances, distances, [sizes[k] for k in order], [own[k] for k in order], self.a_max)
        yield [_message(k, shared, torch.from_numpy(w.a), sent=False) for k, w in zip(order, found, strict=True)]
        return dict(zip(order, found, strict=True))

    def _by_loss(self, shared: Model, local: Mapping[int, Result]) -> Generator[list[Job], Results, Chosen]:
        """One weight a client by the losses of mixtures on a part of its data."""
        grid = [0.0, 0.5, 1.0] if self.estimator == "val3" else np.linspace(0, 1, self.points).tolist()
        if self.estimator != "val3":
            grid = [a for a in grid if a <= self.a_max]
        view, groups = View(split=READS[self.estimator]), blocks(shared.params, "model")
        jobs = []
        for k, result in local.items():
            for a in grid:
                model = _mixture(result.model, shared, np.array([a]), groups)
                job = Job(k, model, source=None, steps=0, view=view, probes={"loss": mean_loss}, returns="nothing")
                jobs.append(replace(job, tag=f"mixture {a:g}"))
        measured = yield jobs
        found: Chosen = {}
        for k in local:
            losses = [float(result.probes["loss"]) for result in measured.of([k])]
            if self.estimator == "val3":
                a, gain = parabola(losses[0], losses[1], losses[2], self.a_max)
            else:
                best = int(np.argmin(losses))  # the least of equals, as too small a weight does no harm
                a, gain = grid[best], losses[0] - losses[best]
            found[k] = (np.array([a]), gain)
        return found


def _mixture(local: Model, shared: Model, a: Array, groups: list[list[str]]) -> Model:
    buffers = shared.buffers if (a == 1).all() else local.buffers
    return Model(mixed(local.params, shared.params, a, groups), buffers)


def _curved(client: int, shared: Model, vectors: list[Params], columns: int) -> Job:
    """A measurement of the Gauss–Newton matrix at the global model along the vectors, block by block."""
    layout = Layout.of(shared.params)
    origin = P.flatten(shared.params)
    span = AtlasSpan(layout, segments(layout, columns), "free")
    start = Model({"c": origin.new_zeros(len(vectors), columns)}, shared.buffers)
    frozen = {
        "origin": origin,
        "anchors": [P.flatten(vector) for vector in vectors],
        "scales": origin.new_ones(1, 1),
        "total": origin.new_zeros(()),
    }
    job = Job(client, start, span, frozen, source=None, steps=0, returns="nothing", held=frozenset(frozen))
    return replace(job, probes={"newton": gauss_newton}, tag="curvature")


def _message(client: int, shared: Model, statistics: Tensor, sent: bool) -> Job:
    """A measurement without work: what the client tells the server, or is told by it."""
    ctx = {"statistics": statistics}
    if sent:
        held = frozenset(ctx)
        return Job(
            client, shared, source=None, steps=0, ctx=ctx, held=held, probes={"statistics": told}, returns="probes"
        )
    return Job(client, shared, source=None, steps=0, ctx=ctx, returns="nothing")
