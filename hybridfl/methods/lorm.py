"""LoRM. Salami, Buzzega, Mosconi, Bonato, Sabetta, Calderara, ICLR 2025, arXiv 2410.17961.

Low-rank updates of a frozen backbone in a class-incremental stream, merged in closed form: within a round over the clients,
where only one factor is trained at a time, and after a task over the tasks. The paper was at hand as an abstract only; the
method is that of the authors' code, without what its specification found to be slips there.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.build import Fraction, PositiveInt
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.lora import DEFAULT, Adapters, Factor, Lora, is_factor, key
from hybridfl.merging.lorm import Memory, TaskMerge, merged_b, merged_layer, merged_tasks, remembered
from hybridfl.merging.regmean import shrink, total
from hybridfl.methods.base import Facts
from hybridfl.params import Params
from hybridfl.probes import Gram, gram_layers
from hybridfl.types import Job, Model, Result, Results, Round, Served, State


@dataclass(frozen=True)
class Grams:
    """How clients measure what goes into their layers.

    Attributes:
        backbone_offdiag: factor of the off-diagonal entries for the adapted layers; at 0 diagonals alone are sent.
        head_offdiag: the same for the head.
        passes: over a client's examples, with the run's augmentation.
        model: a client's own model; or, as in the authors' code, the backbone with the mean of all tasks' updates.
    """

    backbone_offdiag: Fraction = 0.0
    head_offdiag: Fraction = 0.5
    passes: PositiveInt = 1
    model: Literal["current", "task_mean"] = "current"


class LoRM(Facts):
    """Rounds train one factor of every layer and the head, in turn; the server merges them by the clients' Grams.

    A task begins with fresh factors, so nothing of the tasks before is in the clients' nets. What is served is the backbone
    with the merged updates of all tasks up to now; until a task is over, with its factors and Grams of the last round. The
    memory of finished tasks does not grow with their number.

    Args:
        lora: what is adapted.
        order: of the factors, repeated from the beginning of every task; the first starts at 0, the other random.
        gram: of the inputs.
        factor_merge, head_merge: in closed form, or the mean with weights n_k.
        task_merge: in closed form, or the mean or the sum of the tasks' updates; ``none`` is the last task's alone.
        solve_dtype: of the closed forms.
    """

    def __init__(
        self,
        lora: Lora = DEFAULT,
        order: tuple[Factor, ...] = ("B", "A"),
        gram: Grams = Grams(),
        factor_merge: Literal["regmean", "fedavg"] = "regmean",
        head_merge: Literal["regmean", "fedavg"] = "regmean",
        task_merge: TaskMerge | Literal["none"] = "regmean",
        solve_dtype: Literal["float64", "float32"] = "float64",
    ) -> None:
        if not order:
            raise ConfigError("order", "got []: name the factor that is trained; nearest valid value: [B, A].")
        self.lora, self.order, self.gram = lora, order, gram
        self.factor_merge, self.head_merge, self.task_merge = factor_merge, head_merge, task_merge
        self.solve_dtype = solve_dtype

    def init(self, federation: Federation) -> State:
        start, adapters = federation.fresh_model(), self.lora.fitted(federation)
        measurable = gram_layers(federation.net)
        unknown = [layer for layer in adapters.layers if layer not in measurable]
        if unknown and self._backbone_grams:
            problem = f"'{unknown[0]}' is no linear layer or 2-d convolution without groups, and has no Gram matrix"
            raise ConfigError(
                "lora.targets", f"{problem}; leave it out, or set factor_merge=fedavg and task_merge=mean."
            )
        return {
            "layers": list(adapters.layers),
            "full": list(adapters.full),
            "heads": [layer for layer in measurable if f"{layer}.weight" in adapters.full],
            "base": {name: tensor for name, tensor in start.params.items() if name not in adapters.full},
            "theta": {name: start.params[name] for name in adapters.full},
            "task": -1,
            "turn": 0,
            "grams": {},
            "memory": {},
            "holders": [],
            "global": start,
        }

    def notes(self, federation: Federation) -> list[str]:
        notes = []
        if len(federation.tasks) == 1:
            notes.append("LoRM is for class-incremental streams, and this run has one task; try tasks.number=5")
        if not federation.started:
            notes.append("LoRM adapts a trained backbone, and this one is random; try start=FILE (hybridfl pretrain)")
        return notes

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        adapters = self.lora.stored(state["layers"], state["full"])
        if now.task != state["task"]:
            state = self._next_task(state, adapters, now)
        before = state["theta"]
        trained = {*adapters.names(self.order[state["turn"] % len(self.order)]), *adapters.full}
        start = Model({n: t for n, t in before.items() if n in trained}, state["global"].buffers)
        frozen = {"base": state["base"], "factors": {n: t for n, t in before.items() if n not in trained}}
        held = {k: frozenset(["base"] if k in state["holders"] else []) for k in now.clients}
        work = self.lora.work(now.work)
        jobs = [Job(k, start, adapters.map, frozen, work=work, held=held[k]) for k in now.clients]
        backbone = state["layers"] if self._backbone_grams else []
        probing = self._probing(backbone, state["heads"] if self.head_merge == "regmean" else [])
        if self.gram.model == "current" or not state["memory"]:
            results = yield [replace(job, **probing) for job in jobs]
            measured = results
        else:
            results = yield jobs
            measured = yield [self._blended(state, adapters, r, frozen, probing) for r in results]
        grams, shares = [self._grams(r) for r in measured], results.shares("examples")
        theta = before | {name: self._merged(name, before, results, grams, shares) for name in start.params}
        buffers = results.mean_buffers("examples")
        if now.last_of_task and self.task_merge == "regmean" and (state["memory"] or now.index + 1 < now.total):
            # What goes into the layers of the merged model, which is no client's.
            end, base = Model(theta, buffers), {"base": state["base"]}
            job = Job(0, end, adapters.map, base, held=frozenset(base), steps=0, **self._probing(backbone, []))
            measured = yield [replace(job, participant=k) for k in now.clients]
            grams = [self._grams(r) for r in measured]
        state = state | {
            "theta": theta,
            "turn": state["turn"] + 1,
            "grams": {layer: total([gram[layer] for gram in grams]) for layer in backbone if layer in grams[0]},
            "holders": sorted({*state["holders"], *now.clients}),
        }
        return state | {"global": Model(self._deployed(state, adapters), buffers)}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        return [Served(state["global"])]

    @property
    def _backbone_grams(self) -> bool:
        return "regmean" in (self.factor_merge, self.task_merge)

    def _next_task(self, state: State, adapters: Adapters, now: Round) -> State:
        """The state with the task before in memory, and fresh factors."""
        head = {name: tensor for name, tensor in state["theta"].items() if not is_factor(name)}
        factors = adapters.fresh(state["base"], now.rng("factors"), zero=self.order[0])
        memory = {layer: m._asdict() for layer, m in self._memory(state, adapters).items()} if state["turn"] else {}
        return state | {"theta": factors | head, "task": now.task, "turn": 0, "grams": {}, "memory": memory}

    def _memory(self, state: State, adapters: Adapters) -> dict[str, Memory]:
        """Of every layer, with the present task in it."""
        past = {layer: Memory(**memory) for layer, memory in state["memory"].items()}
        residuals = {layer: adapters.residual(layer, state["theta"]) for layer in adapters.layers}
        return {layer: remembered(past.get(layer), r, state["grams"].get(layer)) for layer, r in residuals.items()}

    def _deployed(self, state: State, adapters: Adapters) -> Params:
        """The backbone with the merged updates of all tasks, and the head."""
        if self.task_merge == "none":
            updates = {layer: adapters.residual(layer, state["theta"]) for layer in adapters.layers}
        else:
            memory = self._memory(state, adapters)
            updates = {layer: merged_tasks(of_layer, self.task_merge) for layer, of_layer in memory.items()}
        params = {**state["base"], **state["theta"]}
        for layer, update in updates.items():
            weight = params[f"{layer}.weight"]
            params[f"{layer}.weight"] = weight + update.reshape(weight.shape).to(weight)
        return {name: params[name] for name in state["global"].params}

    def _probing(self, backbone: Sequence[str], heads: Sequence[str]) -> dict[str, Any]:
        """What a job needs to measure the inputs of these layers."""
        if not (backbone or heads):
            return {}
        diagonal = [*(() if self.gram.backbone_offdiag else backbone), *(() if self.gram.head_offdiag else heads)]
        gram = Gram(names=(*backbone, *heads), diagonal=tuple(diagonal))
        return {"probes": {"gram": gram}, "augmented_passes": self.gram.passes}

    def _blended(
        self, state: State, adapters: Adapters, result: Result, frozen: Mapping[str, Any], probing: Mapping[str, Any]
    ) -> Job:
        """A measurement of the client's model with the mean of all tasks' updates, its own among them."""
        share = 1 / (1 + next(iter(state["memory"].values()))["tasks"])
        base = dict(frozen["base"])
        for layer, memory in state["memory"].items():
            weight = base[f"{layer}.weight"]
            base[f"{layer}.weight"] = weight + share * memory["residuals"].reshape(weight.shape).to(weight)
        blend = replace(adapters.map, scale=share * adapters.scale)
        # Clients know the updates of the tasks before.
        return Job(
            result.participant,
            result.model,
            blend,
            {**frozen, "base": base},
            held=frozenset(frozen),
            source=None,
            steps=0,
            **probing,
        )

    def _grams(self, result: Result) -> dict[str, Tensor]:
        """Shrunk Grams by layer, as a client has measured them."""
        heads = {name.rpartition(".")[0] for name in result.model.params if not is_factor(name)}
        dtype: torch.dtype = getattr(torch, self.solve_dtype)
        alpha = {True: self.gram.head_offdiag, False: self.gram.backbone_offdiag}
        measured = result.probes.get("gram", {})
        return {layer: shrink(gram, alpha[layer in heads]).to(dtype) for layer, gram in measured.items()}

    def _merged(
        self,
        name: str,
        before: Params,
        results: Results,
        grams: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
    ) -> Tensor:
        """One trained tensor of all clients."""
        layer, _, kind = name.rpartition(".")
        how = self.factor_merge if is_factor(name) else self.head_merge
        start, trained = before[name], [result.model.params[name] for result in results]
        measured = [gram[layer] for gram in grams if layer in gram]
        if how == "fedavg" or kind == "bias" or not measured:
            return start + P.mean([{name: tensor - start} for tensor in trained], shares)[name]
        if kind == "lora_B":
            return merged_b(trained, before[key(layer, "A")], measured, start, shares)
        flat = merged_layer([tensor.flatten(1) for tensor in trained], measured, start.flatten(1), shares)
        return flat.reshape(start.shape)
