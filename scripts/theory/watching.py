"""The rounds of a run, one after the other, and gradients beside them."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridfl import params as P
from hybridfl import probes
from hybridfl.assignment import task_of
from hybridfl.engine import Record
from hybridfl.experiment import same_numbers
from hybridfl.local import run_task
from hybridfl.merging import atlas as A
from hybridfl.merging.ensemble import mean_logits
from hybridfl.merging.objectives import NEEDS_TEACHER, ServerLoss
from hybridfl.params import Layout
from hybridfl.plan import Plan
from hybridfl.snapshot import Snapshot
from hybridfl.stateless import run_net
from hybridfl.types import SERVER, Apply, Batch, Job, Model, View


@dataclass(frozen=True, eq=False)
class Moment:
    """A round that is done.

    Attributes:
        starts: the global models of this round and of all before it, by round.
        before, after: the engine's snapshots.
    """

    plan: Plan
    starts: Sequence[Model]
    before: Snapshot
    after: Snapshot
    record: Record

    @property
    def index(self) -> int:
        return self.before.round

    @property
    def model(self) -> Model:
        """What the round started from, and the anchors are applied at."""
        return self.starts[self.index]

    @functools.cached_property
    def entries(self) -> list[A.Entry]:
        """The atlas that was merged; nothing for a method without one."""
        found: list[A.Entry] = self.after.state.get("atlas", [])
        return found

    @property
    def arrivals(self) -> list[A.Entry]:
        return [entry for entry in self.entries if entry["added"] == self.index]

    @functools.cached_property
    def clients_gradient(self) -> Tensor:
        """g: of the mean cross-entropy of all the clients' training examples, their labels free of noise, at the model."""
        federation = self.plan.federation
        view = View(owners=tuple(who for who in federation.participants if who != SERVER))
        rows = federation.rows(SERVER, view, self.index)
        labels = torch.from_numpy(federation.pool.y).to(rows.device)[rows]
        return self.measured(Job(SERVER, self.model, view=view, loss=_with_true_labels, ctx={"labels": labels}))

    @functools.cached_property
    def surrogate_gradient(self) -> Tensor:
        """∇f̃_s: of the objective of the search, at the model; 0 in a head that is the server's own."""
        method: Any = self.plan.method
        objective, head = method.objective, self.before.state["head"]
        ctx = {"teacher": self.teacher()} if objective in NEEDS_TEACHER else {}
        start = Model(self.model.params | head, self.model.buffers)
        flat = self.measured(Job(SERVER, start, loss=ServerLoss(objective), ctx=ctx))
        for name, (begin, end) in zip(self.model.params, Layout.of(self.model.params).spans, strict=True):
            if name in head:
                flat[begin:end] = 0
        return flat

    def teacher(self) -> Tensor:
        """Mean logits of the models that arrived, on the server's examples."""
        federation, layout = self.plan.federation, Layout.of(self.model.params)
        x = federation.bench.x[federation.rows(SERVER, View(), self.index)]
        logits = []
        for entry in self.arrivals:
            start = self.starts[entry["birth"]]
            params = layout.unflatten(P.flatten(start.params) + entry["update"])
            with torch.no_grad():
                logits.append(run_net(federation.net.eval(), params, start.buffers, x))
        return mean_logits(logits)

    def measured(self, job: Job) -> Tensor:
        """Gradient of a job's loss, ``(d,)``; measured as the engine would, with nothing booked."""
        federation = self.plan.federation
        job = replace(job, steps=0, probes={"gradient": probes.gradient})
        task = task_of(federation, job, self.index, self.plan.settings.rounds, 0)
        return P.flatten(run_task(federation.bench, task).result.probes["gradient"])

    @property
    def work_length(self) -> float:
        """η: local steps times learning rate, the mean over the clients."""
        federation = self.plan.federation
        work = federation.work
        steps = [work.count(federation.examples(who)) for who in federation.participants if who != SERVER]
        return work.lr * statistics.fmean(steps)


def _with_true_labels(apply: Apply, theta: P.Params, params: P.Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(apply(params, batch.x), ctx["labels"][batch.positions])


def watched(plan: Plan) -> Iterator[Moment]:
    """The rounds of a run, one after the other."""
    engine, starts = plan.engine(), []
    with same_numbers(plan.settings.executor.threads):
        snapshot = engine.begin()
        while snapshot.round < engine.rounds:
            starts.append(snapshot.state["global"])
            after, record = engine.step(snapshot)
            yield Moment(plan, starts, snapshot, after, record)
            snapshot = after
