"""DIMAT: decentralised iterative merging and training.

Saadati, Pham, Saleem, Waite, Balu, Jiang, Hegde, Sarkar, CVPR 2024, arXiv 2404.08079. Agents that started from different
weights align their neighbours' hidden units with their own before they average: activation matching, weights of the
mixing matrix, statistics of BatchNorm made anew.

The paper's full text could not be read; the algorithm is that of the authors' code (nsaadati/DIMAT). It merges, scores
and then trains; a round here trains and then merges, which is the same sequence shifted by one local phase and scores the
same models, those right after merging. So the first round's metrics show the first merge; what the agents scored without
it are those of ``baseline=local_only``, which works on the same examples in the same order. The code looks at everybody's
examples (``stats=all reset_batch_norm=all``), which agents that keep their data cannot; here the default is each agent's
own. With ``proxy`` all look at the same examples, the server's.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

import numpy as np

from hybridfl.build import PositiveInt
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.merging.alignment import Alignment, specification
from hybridfl.methods.peer_average import PeerAverage, Rows, Whose, deliveries, mean_of, view
from hybridfl.types import Job, Model, Results, Round, State


class Dimat(PeerAverage):
    """Peers that permute the hidden units of what they receive before they average it.

    Args:
        match: by ``activation`` (correlations on examples), by ``weight`` (Ainsworth et al. 2023, arXiv 2209.04836), or
            ``identity``, which is :class:`PeerAverage`.
        anchor: ``self`` merges every agent's model in its own order of units. ``agent0``, on a complete graph, merges
            once, at the first agent that is there and in its order, and sends the result to everybody.
        stats: whose training examples the activations are of: each agent's ``own``, its ``neighbours``' too, ``all``
            agents', or as ``proxy`` those that the server gives every agent a copy of, which need no labels.
        stats_examples: at most so many of them, and for ``reset_batch_norm`` as well.
        reset_batch_norm: as in :class:`PeerAverage`; then activations are also looked at with statistics made anew.
    """

    def __init__(
        self,
        match: Literal["activation", "weight", "identity"] = "activation",
        anchor: Literal["self", "agent0"] = "self",
        stats: Whose = "own",
        stats_examples: PositiveInt = 500,
        reset_batch_norm: Whose | Literal["none"] = "own",
    ) -> None:
        super().__init__(None, reset_batch_norm, stats_examples)
        self.match, self.anchor, self.stats = match, anchor, stats
        if match == "activation":
            self.looks_at(stats)

    def init(self, federation: Federation) -> State:
        if self.match != "identity":
            if federation.kept_names:
                problem = f"got {self.match}, but under model.batch_norm=local layers are not all there to be permuted"
                raise ConfigError("match", f"{problem}; nearest valid choice: identity.")
            specification(federation.net, tuple(federation.dataset.train.x.shape[1:]))
        matrix = federation.mixing(0)
        if self.anchor == "agent0" and not np.allclose(matrix, 1 / len(matrix)):
            problem = "got agent0, but the agents do not all talk to each other; nearest valid choice: self"
            raise ConfigError("anchor", f"{problem}, or topology=complete.")
        return super().init(federation)

    def mixed(
        self, models: list[Model], rows: Rows, state: State, now: Round
    ) -> Generator[list[Job], Results, dict[int, Model]]:
        if self.anchor == "self":
            return (yield from self._merged(models, rows, state, now))
        first, *others = rows
        merged = yield from self._merged(models, {first: dict.fromkeys(rows, 1 / len(rows))}, state, now)
        yield [Job(k, merged[first], steps=0, source=first, returns="nothing") for k in others]
        return dict.fromkeys(rows, merged[first])

    def _merged(
        self, models: list[Model], rows: Rows, state: State, now: Round
    ) -> Generator[list[Job], Results, dict[int, Model]]:
        if self.match == "identity":
            return (yield from super().mixed(models, rows, state, now))
        yield deliveries(models, rows)
        aligned = {"aligned": Alignment(self.match, self.sample(now), state["resets"])}
        jobs = [
            Job(
                i,
                models[i],
                view=view(self.stats if self.match == "activation" else "own", i, now),
                steps=0,
                ctx={"own": models[i], "others": {str(j): models[j] for j in row if j != i}},
                held=frozenset({"own", "others"}),
                probes=aligned,
                source=None,
                returns="nothing",
            )
            for i, row in rows.items()
            if len(row) > 1
        ]
        merged = {i: models[i] for i in rows}
        for result in (yield jobs):
            i, found = result.participant, result.probes["aligned"]
            received = {int(name): Model(one["params"], one["buffers"]) for name, one in found.items()}
            merged[i] = mean_of({i: models[i], **received}, rows[i])
            stay = [float(one["fixed_points"]) for one in found.values()]
            now.report("fixed_points", sum(stay) / len(stay), i)
        return merged
