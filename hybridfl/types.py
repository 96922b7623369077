"""The nouns: what a method hands out, what comes back, and what it keeps.

A method yields lists of :class:`Job` and receives :class:`Results`; see :class:`Method`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hybridfl import deferred
from hybridfl import params as P
from hybridfl.deferred import Deferred
from hybridfl.optimizers import LocalWork
from hybridfl.parametrization import Parametrization, full
from hybridfl.params import Params
from hybridfl.rng import stream
from hybridfl.tasks import Which

if TYPE_CHECKING:
    from hybridfl.federation import Federation

Part = Literal["train", "val", "test"]
SERVER: Final = -1
"""The server as a participant; clients are 0 … K - 1."""

State = dict[str, Any]
"""A method's whole memory: nested dicts and lists of tensors, :class:`Model`, int, float, bool, str and None."""


class Model(NamedTuple):
    """What is sent, returned, merged and served."""

    params: Params
    buffers: Params


class Batch(NamedTuple):
    """Examples of a step: inputs ``(b, …)``, labels ``(b,)`` and their positions in the job's view ``(b,)``."""

    x: Tensor
    y: Tensor
    positions: Tensor


class Apply(Protocol):
    """The net as a function: ``apply(params, x)`` gives logits ``(b, classes)``."""

    def __call__(self, params: Params, x: Tensor, /, width: float | None = None) -> Tensor:
        """Logits; of the net at another width, one of the job's ``inner_widths``, if one is given."""
        ...


LossRule = Callable[[Apply, Params, Params, Batch, Mapping[str, Any]], Tensor]
"""``loss(apply, theta, params, batch, ctx)`` → scalar.

With mixup a step takes it twice, on the same inputs with the targets of the examples and with those of their partners.
"""
GradRule = Callable[[Params, Params, Mapping[str, Any]], Params]
"""``grad(gradients, theta, ctx)`` → the gradients to use instead."""
Probe = Callable[["ProbeInput"], Any]
"""A statistic of a model on a view, see :mod:`hybridfl.probes`; returns a tensor, or a dict of tensors."""


@dataclass(frozen=True)
class ProbeInput:
    """What a probe sees: the job's view in evaluation mode, in chunks that fit into memory.

    Attributes:
        apply: ``apply(params, x)`` → logits, in evaluation mode.
        theta: the trained tensors at the end of the local work.
        to_params: θ → params.
        batches: the examples of the view in order, once, or as often as the job's ``augmented_passes`` say.
        loss: the job's loss rule.
        ctx: the job's tensors.
        net: the template module, for the geometry of its layers; its own tensors are never used.
        inputs: ``inputs(params, x, names)`` → what goes into the net's modules of these names in one pass, in
            evaluation mode, see :func:`hybridfl.activations.activations`.
    """

    apply: Apply
    theta: Params
    to_params: Callable[[Params], Params]
    batches: list[Batch]
    loss: LossRule
    ctx: Mapping[str, Any]
    net: nn.Module
    inputs: Callable[[Params, Tensor, Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class View:
    """Whose data a job reads, and which part of them.

    Attributes:
        owners: participants; ``None`` is the job's own. Anybody else's data means that raw data move: the engine books
            the bytes, and refuses it to a method that does not say ``moves_raw_data``.
        split: the training or the validation part; the test part only for a method that says ``upper_bound``.
        tasks: of which tasks of the stream; a run without one has a single task.
        picked: only the examples at these positions of what the others say; ``None`` is all.
    """

    owners: tuple[int, ...] | None = None
    split: Part = "train"
    tasks: Which = "current"
    picked: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """Local work, or with ``steps=0`` a pure measurement.

    Attributes:
        participant: who does it.
        start: the model it starts from. Its ``params`` are what is trained: θ.
        parametrization: the map θ → params of the net, given ``frozen``.
        frozen: tensors the map needs beside θ; they are sent too.
        view: whose data, which part.
        work: optimiser, batch size and amount; ``None`` is the run's ``client_optimizer``.
        steps: overrides the number of steps of ``work``; 0 is a measurement.
        loss: rule of the loss; ``None`` is cross-entropy.
        grad: rule that corrects the gradient; ``None`` leaves it.
        ctx: numbers and tensors the rules read; they are sent too.
        probes: statistics wanted at the end, by name.
        augmented_passes: how often probes see the view with the run's augmentation, for statistics of inputs alone; 0, and
            any number in a run without augmentation, is the view once as it is.
        tag: tells several jobs of a participant in one round apart, and keys their randomness.
        random_tag: keys the randomness in place of ``tag``; jobs that share it see the same examples in the same order.
        optimizer_state: state to continue from; ``None`` starts afresh.
        keep_optimizer: return the optimiser's state.
        source: who sends the start: the server, a peer, or ``None`` when the participant has it already.
        held: names of ``frozen`` and ``ctx`` that the participant has already; ``"optimizer_state"`` for that.
        returns: what leaves the participant: everything, the statistics alone, or nothing. Only what moves is booked.
        width: of the net, as a fraction of the model's own width; ``start`` must be of that width.
        inner_widths: further widths at which the loss runs the net.
    """

    participant: int
    start: Model
    parametrization: Parametrization = full
    frozen: Mapping[str, Any] = field(default_factory=dict)
    view: View = View()
    work: LocalWork | None = None
    steps: int | None = None
    loss: LossRule | None = None
    grad: GradRule | None = None
    ctx: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Probe] = field(default_factory=dict)
    augmented_passes: int = 0
    tag: str = ""
    random_tag: str | None = None
    optimizer_state: State | None = None
    keep_optimizer: bool = False
    source: int | None = SERVER
    held: frozenset[str] = frozenset()
    returns: Literal["all", "probes", "nothing"] = "all"
    width: float = 1.0
    inner_widths: tuple[float, ...] = ()

    @property
    def is_measurement(self) -> bool:
        return self.steps == 0


@dataclass(frozen=True, eq=False)
class Result:
    """What comes back from a job.

    Attributes:
        participant, tag: as in the job.
        start: the model the job started from (shared, not copied).
        model: θ after the local work, and the buffers it left. Clients in lock-step may leave it to the first who reads it
            to have it written out, see :mod:`hybridfl.deferred`; means need not.
        examples: size of the view.
        steps: local steps really done.
        loss: mean loss over these steps; NaN for a measurement.
        probes: statistics asked for, by name.
        optimizer_state: if asked for.
        birth: round in which the job started; the staleness is the round of arrival minus this.
    """

    participant: int
    tag: str
    start: Model
    model: Model
    examples: int
    steps: int
    loss: float
    probes: Mapping[str, Any] = field(default_factory=dict)
    optimizer_state: State | None = None
    birth: int = 0

    @property
    def deferred(self) -> Deferred | None:
        """The model, if it is not written out yet."""
        given: Model | Deferred = vars(self)["_model"]
        return given if isinstance(given, Deferred) and not given.stack.is_written else None

    def write_out(self) -> None:
        """As if it had been read."""
        _ = self.model

    @property
    def delta(self) -> Params:
        """The update: θ after minus θ before."""
        return P.subtract(self.model.params, self.start.params)


class _Model:
    """:attr:`Result.model`, which may be given deferred, and is written out when it is read."""

    def __get__(self, result: Result | None, owner: type[Result]) -> Any:
        if result is None:
            return self
        given: Model | Deferred = vars(result)["_model"]
        if isinstance(given, Deferred):
            vars(result)["_model"] = given = Model(given.params(), {})
        return given

    def __set__(self, result: Result, value: Model | Deferred) -> None:
        vars(result)["_model"] = value


# After the class has been made, as type checkers take a field's descriptor for a default.
Result.model = _Model()  # type: ignore[assignment]


class Results(list[Result]):
    """Results of one yield, in the order of the jobs (late ones in the order of their arrival slots)."""

    def weights(self, by: Literal["examples", "uniform"] = "examples") -> list[float]:
        return [float(r.examples) if by == "examples" else 1.0 for r in self]

    def shares(self, by: Literal["examples", "uniform"] = "examples") -> list[float]:
        """Weights that sum to 1."""
        weights = self.weights(by)
        return [weight / math.fsum(weights) for weight in weights]

    def around(self, base: Params) -> list[Params]:
        """The models as they would be had they started from ``base``: base plus update."""
        return [P.add(base, r.delta) for r in self]

    def mean(self, by: Literal["examples", "uniform"] = "examples") -> Model:
        """Weighted mean of the returned models, buffers too."""
        waiting = [found for r in self if (found := r.deferred)]
        if waiting and len(waiting) == len(self):
            return Model(deferred.mean(waiting, self.shares(by)), {})
        return Model(P.mean([r.model.params for r in self], self.weights(by)), self.mean_buffers(by))

    def mean_delta(self, by: Literal["examples", "uniform"] = "examples") -> Params:
        """Weighted mean of the updates."""
        return P.mean([r.delta for r in self], self.weights(by))

    def mean_buffers(self, by: Literal["examples", "uniform"] = "examples") -> Params:
        return P.mean([r.model.buffers for r in self], self.weights(by)) if self else {}

    def of(self, participants: Iterable[int]) -> Results:
        wanted = set(participants)
        return Results(r for r in self if r.participant in wanted)


class Served(NamedTuple):
    """A model a participant would deploy; several of them are an ensemble of weighted mean logits.

    Attributes:
        weight: relative to the others of the ensemble.
        width: of the net that the model fits.
        tag: of the jobs that train it; tensors that a participant keeps to itself are kept by tag.
    """

    model: Model
    weight: float = 1.0
    width: float = 1.0
    tag: str = ""


@dataclass
class Round:
    """What a method may know about the round it is in.

    Attributes:
        index: 0, 1, ….
        total: number of rounds of the run.
        clients: the clients that start working now, from the present model, in the order in which their results arrive.
            With a delay or an event queue the same client may be there twice, and in some rounds nobody is.
        cohort: number of client results that are due in this round; fewer arrive where clients drop out or fail.
        work: the run's local work (``client_optimizer``).
        seed: of the run.
        task: number of the task in the stream; 0 without one.
        first_of_task, last_of_task: whether the round begins and ends its task.
        mixing: the mixing matrix ``(clients, clients)`` of peers; ``None`` with a server.
        kept: names of the tensors that every client keeps to itself; they are not sent, whatever a model has in their place.
    """

    index: int
    total: int
    clients: list[int]
    cohort: int
    work: LocalWork
    seed: int
    task: int = 0
    first_of_task: bool = False
    last_of_task: bool = False
    mixing: np.ndarray | None = None
    kept: frozenset[str] = frozenset()
    reports: list[tuple[str, int | None, float]] = field(default_factory=list)

    def rng(self, purpose: str, participant: int | None = None) -> np.random.Generator:
        """A random stream of its own for this purpose, round and participant."""
        # The prefix keeps a method's streams apart from the engine's own, whatever it calls them.
        return stream(self.seed, f"method: {purpose}", self.index, *(() if participant is None else (participant,)))

    def report(self, name: str, value: float | Tensor, participant: int | None = None) -> None:
        """A number for ``method.csv``, written when the round commits."""
        number = value.item() if isinstance(value, torch.Tensor) else value
        self.reports.append((name, participant, float(number)))


class Method(Protocol):
    """Three functions and a few facts; a method keeps nothing on ``self`` but its numbers.

    One may also have ``notes(federation)``: sentences that its user should read before the first round; and ``instead``, a
    mapping from what it requires to the name of the choice nearest to it that does without.

    Attributes:
        requires: what it needs of the federation, such as ``"server_data"`` and ``"server_labels"``.
        asynchronous: whether it can use results that arrive late (``clients.delay`` > 0 or ``clients.concurrency``).
        topology: ``"star"`` for a server and its clients, ``"peers"`` for clients that talk to each other.
        moves_raw_data: whether examples leave their owner; tables mark such methods.
        upper_bound: whether test data are read, which makes the method an upper bound; tables mark such methods.
        widths: at which ``serve`` can be asked for a model beside its usual one, as fractions of the model's width.
        alternatives: names of further models of a participant that are scored beside the one it would deploy, such as its
            purely local one; a method that names some has a function ``alternative(name, state, participant)`` like
            ``serve``.
        client_columns: names under which a round reports numbers of single participants that ``clients.csv`` shows too.
    """

    requires: frozenset[str]
    asynchronous: bool
    topology: str
    moves_raw_data: bool
    upper_bound: bool
    widths: tuple[float, ...]
    alternatives: tuple[str, ...]
    client_columns: tuple[str, ...]

    def init(self, federation: Federation) -> State:
        """The state before round 0. Raises ConfigError for options that do not fit this federation."""
        ...

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        """Yield jobs, receive results, as often as needed; return the new state. ``state`` is never changed in place.

        The first yield that gives clients work hands out the jobs born now and receives the client results due now. Work of
        the server and measurements that it depends on are yielded before it, in rounds with ``now.clients``; in others the
        first yield of all receives what is due.
        """
        ...

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        """What ``participant`` would deploy; ``SERVER`` asks for the global model; ``[]`` means there is none.

        Args:
            width: one of ``widths``, or ``None`` for what the participant would use if nobody asks.
        """
        ...
