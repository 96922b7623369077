"""Feddle: merging guided by the server's examples.

Zhu, Yao, Ceritli, Ozkan, Blaschko, Noh, Min, Min, Ozay, *Guided Model Merging for Hybrid Data Learning: Leveraging
Centralized Data to Refine Decentralized Models*, WACV 2026, arXiv 2503.20138.

Clients learn directions, the server learns coordinates: updates are kept in an atlas, brought to one length, and the
global model moves to ω + Σ cₖ āₖ with signed coefficients c searched on the server's examples; a fallback guards the
step. The paper's full text could not be read. Known are the blocks and their order (buffer with add and remove, anchor
normalisation, search and fallback, update), negative coefficients, and a surrogate loss out of domain; the rules and
formulas within the blocks are inferred, and each is an option.

The server must see individual updates, so Feddle excludes secure aggregation.

Extensions, all off by default and of no paper as a whole: ``origin=calibrated`` searches around CA²FL's step instead of ω,
``residual`` moves the weights themselves in the steps of the search, ``teacher=cached`` distils all clients' last models,
``server_axis`` adds the server's own update to the axes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl import probes
from hybridfl.build import Fraction, PositiveInt, Range
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.merging import atlas as A
from hybridfl.merging.acceptance import Fallback, guarded
from hybridfl.merging.coefficients import Coef, initial
from hybridfl.merging.ensemble import mean_logits
from hybridfl.merging.objectives import NEEDS_LABELS, NEEDS_TEACHER, Objective, ServerLoss, disagreement
from hybridfl.merging.search import (
    Residual,
    Search,
    ServerAxis,
    Space,
    Split,
    Teachers,
    along_the_servers_axis,
    descended,
    evolved,
    fine_tuned,
    solved,
)
from hybridfl.methods.base import Facts
from hybridfl.methods.ca2fl import CA2FL
from hybridfl.parametrization import AtlasSpan
from hybridfl.params import Layout, Params
from hybridfl.types import SERVER, Job, Model, Result, Results, Round, Served, State, View

CALIBRATION = CA2FL(unseen="mean")


class Feddle(Facts):
    """Guided merging over an atlas of client updates, see the module.

    Args:
        anchor: ``delta`` keeps updates and applies them at the present model; ``model`` keeps the clients' models and
            points at them.
        origin: where the axes meet: ``fresh`` ω, or ``calibrated``: ω + v, where v is the mean of the newest updates of all
            clients seen plus the mean, over what arrived, of what is new in it, see
            :class:`~hybridfl.methods.ca2fl.CA2FL`.
        origin_drop: a client leaves the mean of ``calibrated`` while its offset was negative in so many merges in a row;
            null keeps all.
        atlas, coef, search, residual, server_axis, fallback: options of the blocks.
        norm: how anchors are brought to one length, see :func:`hybridfl.merging.atlas.scales`.
        objective: loss on the server's examples: ``ce`` in domain; ``kd``, ``head``, ``entropy`` out of domain; ``mix`` of ce
            and kd; ``gradmatch`` along the server's gradient.
        teacher: whose mean logits ``kd`` and ``mix`` distil: of the models that arrived, or of every client's last one, whose
            logits are ``cached``.
        mix_weight: of ce in ``mix``; ``agreement`` is the share of the server's labels that the teacher predicts.
        ema: of the served model, an exponential mean of the global models; null serves the last.
    """

    asynchronous = True

    def __init__(
        self,
        anchor: Literal["delta", "model"] = "delta",
        origin: Literal["fresh", "calibrated"] = "fresh",
        origin_drop: PositiveInt | None = None,
        atlas: A.Atlas = A.Atlas(),
        norm: A.Norm = "mean",
        coef: Coef = Coef(),
        search: Search = Search(),
        residual: Residual = Residual(),
        server_axis: ServerAxis = ServerAxis(),
        objective: Objective = "ce",
        teacher: Literal["arrivals", "cached"] = "arrivals",
        mix_weight: Fraction | Literal["agreement"] = 0.5,
        fallback: Fallback = Fallback(),
        ema: Annotated[float, Range(above=0, below=1)] | None = None,
    ) -> None:
        if search.kind == "closed_form" and coef.constraint not in ("affine", "free"):
            raise ConfigError(
                "coef.constraint", f"got {coef.constraint}; search.kind=closed_form takes affine or free."
            )
        if objective in ("entropy", "gradmatch") and search.kind == "closed_form":
            raise ConfigError(
                "search.kind", f"got closed_form, whose curvature is not that of objective={objective}; try adam."
            )
        if objective == "gradmatch" and (residual.lr > 0 or server_axis.examples != "none"):
            raise ConfigError("objective", "got gradmatch, which is for coefficients alone; nearest: ce.")
        beside = {"objective=head": objective == "head", "residual.lr": residual.lr > 0}
        beside["server_axis"] = server_axis.examples != "none"
        for option, wanted in beside.items():
            if wanted and search.kind not in ("adam", "sgd"):
                raise ConfigError("search.kind", f"got {search.kind}; {option} takes adam or sgd.")
        if beside["server_axis"] and coef.frozen:
            raise ConfigError(
                "server_axis.examples", f"got {server_axis.examples}, but coef.frozen=true; nearest: none."
            )
        if beside["server_axis"] and search.steps == 1:
            raise ConfigError("search.steps", "got 1; server_axis takes half of them; nearest: 2.")
        if origin == "calibrated" and coef.constraint == "simplex":
            raise ConfigError("coef.constraint", "got simplex; offsets of origin=calibrated sum to 0; nearest: affine.")
        if origin == "calibrated" and coef.init in ("examples", "uniform"):
            problem = f"got {coef.init}; offsets of origin=calibrated start at 0 or warm; nearest: fresh."
            raise ConfigError("coef.init", problem)
        if origin == "fresh" and origin_drop is not None:
            raise ConfigError("origin_drop", f"got {origin_drop}, which takes origin=calibrated; nearest: null.")
        self.anchor, self.origin, self.origin_drop, self.atlas, self.norm = anchor, origin, origin_drop, atlas, norm
        self.coef, self.search, self.residual, self.server_axis = coef, search, residual, server_axis
        self.objective, self.teacher, self.mix_weight = objective, teacher, mix_weight
        self.fallback, self.ema = fallback, ema
        labels = {"server_labels"} if objective in NEEDS_LABELS else set()
        self.requires = frozenset({"server_data", *labels})
        extended = origin == "calibrated" or residual.lr > 0 or teacher == "cached"
        self.instead = {"server_labels": "feddle_joint_labelfree"} if labels and extended else {}

    def init(self, federation: Federation) -> State:
        cohort = federation.clients.cohort
        size = self.atlas.size or self.atlas.cohorts * cohort
        if size < cohort:
            raise ConfigError("atlas.size", f"got {size}, but {cohort} updates arrive a round; nearest: {cohort}.")
        if self.fallback.accept == "heldout" and not all(federation.by_task(SERVER, "val")):
            of_task = " of a task" if len(federation.tasks) > 1 else ""
            problem = (
                f"got heldout, but the server has no validation examples{of_task}; try server_data.validation=0.2."
            )
            raise ConfigError("fallback.accept", problem)
        if self.server_axis.examples == "halves" and min(federation.by_task(SERVER)) < 2:
            raise ConfigError("server_axis.examples", "got halves, but the server has a single example; nearest: same.")
        start = federation.fresh_model()
        head = {name: tensor for name, tensor in start.params.items() if name.startswith("head.")}
        if self.objective == "head" and not head:
            raise ConfigError("objective", "got head, but the net has no part called 'head'; nearest: kd.")
        state: State = CALIBRATION.init(federation) if self.origin == "calibrated" else {}
        if self.origin_drop is not None:
            state["negative"] = [0] * federation.clients.number
        if self.teacher == "cached":
            state |= {"task": 0, "logits": self._forgotten(federation.clients.number)}
        if self.search.prox == "auto" or self.server_axis.examples != "none":
            state["examples"] = federation.by_task(SERVER)
        if self.ema is not None:
            state["ema"] = start
        head = head if self.objective == "head" else {}
        return state | {"global": start, "atlas": [], "size": size, "head": head}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        return [Served(state["global"] if self.ema is None else state["ema"])]

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        model: Model = state["global"]
        arrived = yield [Job(client, model) for client in now.clients]
        state, teachers = yield from self._taught(state, arrived, now)
        entries = A.add(state["atlas"], [self._entry(result, now) for result in arrived], self.atlas.per_client)
        downhill: Tensor | None = None
        if self.atlas.evict == "cosine":
            (slopes,) = yield from self._downhill(state, teachers)
            downhill = P.flatten(slopes)
        omega = None if self.anchor == "delta" else P.flatten(model.params)
        entries, removed = A.evict(entries, state["size"], now.index, self.atlas.evict, downhill, omega)
        if self.origin == "calibrated":
            state = CALIBRATION.merged(state, arrived, now)
        space = self._space(state, model, entries, arrived, teachers, now)
        start = initial(space, self.coef.init, entries, arrived, now)
        space, found = yield from self._searched(space, start, state, now)
        unsearched = {name: torch.zeros_like(t) for name, t in found.items()} | {"c": space.default}
        damp = self.fallback.damp
        damped = {name: damp * t + (1 - damp) * unsearched[name] for name, t in found.items()}
        point, fell_back = yield from guarded(space, damped, unsearched, self.fallback, now)
        skipped = fell_back and self.fallback.action == "skip"
        c, params = point["c"], model.params if skipped else space.params(point)
        entries = [entry | {"coefficients": row} for entry, row in zip(entries, c, strict=True)]
        # After a fallback the coefficients say nothing of the anchors.
        keeps_all = fell_back or self.atlas.drop_below == 0
        kept = [e for e in entries if keeps_all or e["added"] == now.index or not self._negligible(e, space, arrived)]
        if self.origin_drop is not None and not fell_back:
            state = self._without_the_negative(state, entries, now)
        for entry in entries:
            now.report("coefficient", entry["coefficients"].mean(), entry["client"])
        now.report("fallback", fell_back)
        now.report("atlas", len(kept))
        now.report("dropped", len(removed) + len(entries) - len(kept))
        if "residual" in point:
            now.report("residual", point["residual"].norm() / space.anchor_length)
        merged = Model(params, model.buffers if skipped else space.buffers)
        return state | {"global": merged, "atlas": kept, "head": space.extra} | self._averaged(state, merged, now)

    def _averaged(self, state: State, merged: Model, now: Round) -> State:
        """The served model, where it is a mean of the global ones; the random start is not one of them."""
        if self.ema is None:
            return {}
        pairs, weights = zip(merged, state["ema"], strict=True), [1 - self.ema, self.ema]
        # Before the first merge the served model is the start itself.
        return {"ema": Model(*(P.mean(pair, weights) for pair in pairs)) if state["atlas"] else merged}

    # -- the atlas ----------------------------------------------------------------------------------------------------

    def _entry(self, result: Result, now: Round) -> A.Entry:
        kept = result.delta if self.anchor == "delta" else result.model.params
        update, storage = P.flatten(kept), self.atlas.storage
        return {
            "update": update if storage == "exact" else update.to(getattr(torch, storage)),
            "client": result.participant,
            "birth": result.birth,
            "added": now.index,
        }

    def _negligible(self, entry: A.Entry, space: Space, arrived: Results) -> bool:
        relative = entry["coefficients"].abs().mean() / space.length * len(arrived)
        return float(relative) < self.atlas.drop_below

    def _downhill(
        self, state: State, teachers: Teachers, splits: tuple[Split, ...] = ("train",)
    ) -> Generator[list[Job], Results, list[Params]]:
        """Minus the gradient of the objective at ω on each part; 0 in a head that is the server's own."""
        model, head = state["global"], state["head"]
        jobs = [
            Job(
                SERVER,
                Model(model.params | head, model.buffers),
                loss=ServerLoss("ce" if self.objective == "gradmatch" else self.objective),
                ctx=teachers.get(split, {}),
                view=View(split=split),
                steps=0,
                probes={"gradient": probes.gradient},
            )
            for split in splits
        ]
        gradients = [result.probes["gradient"] for result in (yield jobs)]
        return [{n: torch.zeros_like(t) if n in head else -t for n, t in gradient.items()} for gradient in gradients]

    def _without_the_negative(self, state: State, entries: list[A.Entry], now: Round) -> State:
        """The state with the clients out of the calibration whose offsets have been negative for too long."""
        negative, cache, total = list(state["negative"]), list(state["cache"]), state["sum"]
        # A client's newest entry is its last.
        for client, c in {entry["client"]: entry["coefficients"].mean() for entry in entries}.items():
            negative[client] = negative[client] + 1 if c < 0 else 0
        for client, times in enumerate(negative):
            if times >= (self.origin_drop or 0) and cache[client] is not None:
                total, cache[client] = P.subtract(total, cache[client]), None
        now.report("left_out", sum(times >= (self.origin_drop or 0) for times in negative))
        return state | {"negative": negative, "cache": cache, "sum": total}

    # -- the teacher --------------------------------------------------------------------------------------------------

    def _splits(self) -> tuple[Split, ...]:
        return ("train", "val") if self.fallback.accept == "heldout" else ("train",)

    def _forgotten(self, clients: int) -> dict[Split, list[Tensor | None]]:
        return {split: [None] * clients for split in self._splits()}

    def _taught(
        self, state: State, arrived: Results, now: Round
    ) -> Generator[list[Job], Results, tuple[State, Teachers]]:
        """Mean logits on the server's inputs, for each part that is looked at; the state with what is cached of them."""
        if self.objective == "gradmatch":
            slopes = yield from self._downhill(state, {}, self._splits())
            bodies = [{n: t for n, t in slope.items() if not n.startswith("head.")} for slope in slopes]
            omega = state["global"].params
            seen = [{"omega": omega, "downhill": body} for body in bodies]
            return state, dict(zip(self._splits(), seen, strict=True))
        if self.objective not in NEEDS_TEACHER:
            return state, {}
        jobs = [
            Job(SERVER, r.model, view=View(split=split), steps=0, probes={"logits": probes.logits}, tag="teacher")
            for split in self._splits()
            for r in arrived
        ]
        found = iter([result.probes["logits"] for result in (yield jobs)])
        logits: dict[Split, list[Any]] = {split: [next(found) for _ in arrived] for split in self._splits()}
        if self.teacher == "cached":
            # In another task the server's examples are others.
            is_new = state["task"] != now.task
            known = self._forgotten(len(state["logits"]["train"])) if is_new else state["logits"]
            cached = {split: list(known[split]) for split in logits}
            for split, rows in logits.items():
                for result, row in zip(arrived, rows, strict=True):
                    cached[split][result.participant] = row
            state = state | {"task": now.task, "logits": cached}
            logits = {split: [row for row in rows if row is not None] for split, rows in cached.items()}
        teachers: Teachers = {split: {"teacher": mean_logits(rows)} for split, rows in logits.items()}
        if self.objective == "mix" and self.mix_weight != 0.5:
            weight = yield from self._ce_weight(state, teachers, now)
            teachers = {split: {**seen, "ce_weight": weight} for split, seen in teachers.items()}
        return state, teachers

    def _ce_weight(self, state: State, teachers: Teachers, now: Round) -> Generator[list[Job], Results, float]:
        if self.mix_weight != "agreement":
            return self.mix_weight
        asked = Job(
            SERVER,
            state["global"],
            loss=disagreement,
            ctx=teachers["train"],
            steps=0,
            probes={"loss": probes.mean_loss},
        )
        (result,) = yield [asked]
        weight = 1 - float(result.probes["loss"])
        now.report("agreement", weight)
        return weight

    # -- the search ---------------------------------------------------------------------------------------------------

    def _space(
        self, state: State, model: Model, entries: list[A.Entry], arrived: Results, teachers: Teachers, now: Round
    ) -> Space:
        """The space around the state's global model, which may be ahead of ``model``, that the anchors start from."""
        layout = Layout.of(model.params)
        omega, origin = P.flatten(model.params), P.flatten(state["global"].params)
        anchors = [entry["update"] if self.anchor == "delta" else entry["update"] - omega for entry in entries]
        fresh = [entry["added"] == now.index for entry in entries]
        exact = [anchor.to(origin.dtype) for anchor in anchors]
        scales, length = A.scales(exact, fresh, self.norm, layout)
        blocks = layout.blocks()[-1][2] + 1
        columns = blocks if self.coef.granularity == "block" else 1
        span = AtlasSpan(
            layout=layout,
            segments=A.segments(layout, max(columns, scales.shape[1])),
            constraint=self.coef.constraint,
            c_max=self.coef.c_max * length,
        )
        is_calibrated = self.origin == "calibrated"
        total = origin.new_tensor(0.0 if is_calibrated else length)
        frozen = {"origin": origin, "anchors": anchors, "scales": scales, "total": total}
        default = origin.new_tensor([float(is_fresh) for is_fresh in fresh]) * (length / len(arrived))
        default = (
            (torch.zeros_like(default) if is_calibrated else default).unsqueeze(1).expand(-1, columns).contiguous()
        )
        prox = self.search.prox
        if prox == "auto":
            prox = 0.2 * len(entries) / state["examples"][now.task]
        ctx = {"default": default, "prox": prox / length**2, "span_frozen": frozen}
        return Space(
            span=span,
            frozen=frozen,
            objective=self.objective,
            default=default,
            length=length,
            anchor_length=float(torch.stack([anchor.norm() for anchor in exact]).mean()) or 1.0,
            extra=state["head"],
            buffers=arrived.mean_buffers("uniform"),
            ctx=ctx,
            teachers=teachers,
        )

    def _searched(
        self, space: Space, start: Tensor, state: State, now: Round
    ) -> Generator[list[Job], Results, tuple[Space, Params]]:
        """The space, with the server's head after the search, and the point that was found in it."""
        search, residual = self.search, self.residual
        if search.steps == 0 or (self.coef.frozen and not residual.lr):
            return space, {"c": space.constrained(start)}
        if self.coef.frozen:
            c = space.constrained(start)
            z, head = yield from fine_tuned(space, c, search, residual, search.steps)
            return replace(space, extra=head), {"c": c, "residual": z}
        if search.kind == "es":
            return space, {"c": (yield from evolved(space, start, search, now))}
        if search.kind == "closed_form":
            return space, {"c": (yield from solved(space, start))}
        if self.server_axis.examples != "none":
            examples = state["examples"][now.task]
            return (yield from along_the_servers_axis(space, start, search, residual, self.server_axis, examples, now))
        point, head = yield from descended(space, {"c": start}, search, residual, search.steps)
        return replace(space, extra=head), point
