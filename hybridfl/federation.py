"""Participants and their data: who owns which examples, and the model everybody starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hybridfl.availability import Clients
from hybridfl.behaviour import Role, spoil
from hybridfl.costs import forward_macs
from hybridfl.data.augmentation import Augment
from hybridfl.data.dataset import Dataset, Examples
from hybridfl.data.split import Split
from hybridfl.errors import ConfigError
from hybridfl.local import Workbench, laid_out
from hybridfl.models import batch_norm
from hybridfl.models.options import InputScale, ModelOptions
from hybridfl.optimizers import LocalWork
from hybridfl.rng import stream
from hybridfl.tasks import TaskStream
from hybridfl.types import SERVER, Model, Part, View


@dataclass(eq=False)
class Federation:
    """Clients 0 … K - 1 and the server, each with views of one pool of examples.

    Attributes:
        dataset: of the clients' task.
        pool: its training part, then the examples that only the server has.
        split: who owns which.
        clients: their number and behaviour.
        net: the template module.
        work: the run's local work.
        provides: what methods may require, such as ``"server_data"``.
        seed: of the run.
        device, dtype: where and how precisely tensors are kept.
        chunk: examples a forward pass without gradient takes at once.
        start: the model of round 0.
        tasks: which classes are on when.
        started: whether the start was trained or read, not random.
        initial: whether all clients draw the same random weights.
        starts: models that clients start from instead of ``start``.
        topology: the graph of peers; ``None`` for a method with a server.
        reads_test: whether the pool holds the test part too, for a method that is an upper bound.
        build: the net of a width, its weights drawn from a stream of the run's own that a name tells apart.
        model_options: the keys of the model node that the program handles.
        scale: mean and deviation by which inputs are standardised.
        augment: what changes the inputs of every step of local work; ``None`` leaves them.
    """

    dataset: Dataset
    pool: Examples
    split: Split
    clients: Clients
    net: nn.Module
    work: LocalWork
    provides: frozenset[str]
    seed: int
    device: torch.device
    dtype: torch.dtype
    chunk: int
    start: Model
    build: Callable[[float, str], nn.Module]
    tasks: TaskStream
    model_options: ModelOptions
    scale: InputScale
    started: bool = False
    initial: Literal["same", "different"] = "same"
    starts: Mapping[int, Model] = field(default_factory=dict)
    topology: Any = None
    reads_test: bool = False
    augment: Augment | None = None

    def fresh_model(self, participant: int = SERVER, width: float = 1.0, name: str = "") -> Model:
        """The model a participant starts from; do not change its tensors in place.

        Args:
            width: of the net.
            name: of a further random model, such as ``"base 3"``; without one, at full width, it is the run's start.

        Raises:
            ConfigError: the run starts from trained weights, which a narrow or further model does not have.
        """
        if width == 1 and not name:
            if self.initial == "different" and participant not in self.starts and participant != SERVER:
                return self._own_start(participant)
            return self.starts.get(participant, self.start)
        if self.started:
            raise ConfigError("start", "must be random: this method starts from several models or narrower ones.")
        return initial_model(self.build(width, name), self.device, self.dtype)

    def _own_start(self, client: int) -> Model:
        if client not in self._drawn:
            self._drawn[client] = initial_model(self.build(1.0, f"client {client}"), self.device, self.dtype)
        return self._drawn[client]

    @cached_property
    def _drawn(self) -> dict[int, Model]:
        return {}

    def mixing(self, round: int) -> NDArray[np.float64]:
        """The mixing matrix ``(clients, clients)`` of a round, for a method of peers."""
        matrix: NDArray[np.float64] = self.topology.mixing(self.clients.number, self.seed, round)
        return matrix

    def net_at(self, width: float) -> nn.Module:
        """The template module of a width."""
        if width != 1 and width not in self._other_widths:
            self._other_widths[width] = self.build(width, "").to(self.device, self.dtype)
        return self.net if width == 1 else self._other_widths[width]

    @cached_property
    def _other_widths(self) -> dict[float, nn.Module]:
        return {}

    @cached_property
    def kept_names(self) -> frozenset[str]:
        """Tensors that every client keeps to itself: those of BatchNorm layers under ``model.batch_norm=local``."""
        return batch_norm.names(self.net) if self.model_options.batch_norm == "local" else frozenset()

    @property
    def classes(self) -> int:
        return self.dataset.classes

    @property
    def participants(self) -> list[int]:
        """The clients that train, then the server if it owns examples."""
        server = [SERVER] if len(self.split.server_train) else []
        return [*self.clients.trainers(self.seed), *server]

    @property
    def labelled(self) -> list[int]:
        """Participants whose examples have labels of the clients' task."""
        return [who for who in self.participants if who != SERVER or "server_labels" in self.provides]

    def owned(self, participant: int, split: Part = "train") -> np.ndarray:
        """Positions in the pool that a participant owns."""
        if split == "test":
            whole = np.arange(len(self.dataset.test)) if self.split.server_test is None else self.split.server_test
            return len(self.pool) + (whole if participant == SERVER else self.split.clients_test[participant])
        if participant == SERVER:
            return self.split.server_train if split == "train" else self.split.server_val
        shares = self.split.clients_train if split == "train" else self.split.clients_val
        return shares[participant]

    @property
    def server_counts(self) -> dict[str, list[int] | None]:
        """The server's examples by class, if its labels are of the clients' task, and by domain of the data set."""
        owned = np.concatenate([self.split.server_train, self.split.server_val])
        classes = np.bincount(self.pool.y[owned], minlength=self.classes).tolist()
        domains = np.bincount(self.pool.domain[owned], minlength=len(self.dataset.domains))
        return {
            "server_class_counts": classes if "server_labels" in self.provides else None,
            "server_domain_counts": domains[: len(self.dataset.domains)].tolist(),
        }

    def examples(self, participant: int, split: Part = "train") -> int:
        return len(self.owned(participant, split))

    def by_task(self, participant: int, split: Part = "train") -> list[int]:
        """Numbers of examples of each task; a run without a stream has one."""
        return [len(self.rows(participant, View(split=split, tasks=task))) for task in range(len(self.tasks))]

    def rows(self, participant: int, view: View, round: int = 0) -> Tensor:
        """Positions in the pool that a job's view covers in a round, on the pool's device."""
        owners = (participant,) if view.owners is None else view.owners
        labels = self.tasks.labels(view.tasks, round)
        key = (owners, view.split, labels)
        if key not in self._rows:
            picked = np.concatenate([self.owned(owner, view.split) for owner in owners])
            if labels is not None:
                y = np.concatenate([self.pool.y, self.dataset.test.y])
                picked = picked[np.isin(y[picked], labels)]
            self._rows[key] = torch.from_numpy(picked).to(self.device)
        rows = self._rows[key]
        return rows if view.picked is None else rows[torch.tensor(view.picked, dtype=torch.int64, device=self.device)]

    @cached_property
    def _rows(self) -> dict[tuple[tuple[int, ...], str, tuple[int, ...] | None], Tensor]:
        return {}

    @cached_property
    def roles(self) -> dict[int, Role]:
        """The clients that are held out, noisy or hostile."""
        return self.clients.roles(self.seed)

    @property
    def noisy_clients(self) -> list[int]:
        """Those with random labels."""
        return [client for client, role in self.roles.items() if role == "noisy_labels"]

    @cached_property
    def bench(self) -> Workbench:
        """The net and the pool of training examples, spoilt ones in place; labels nobody knows are -1."""
        labels, x = self.pool.y.copy(), self._standardised(self.pool)
        if not self.provides & {"server_labels", "server_own_labels"}:
            labels[np.concatenate([self.split.server_train, self.split.server_val])] = -1
        for client, role in self.roles.items():
            owned = np.concatenate([self.owned(client, "train"), self.owned(client, "val")])
            rng = stream(self.seed, role.replace("_", " "), client)
            spoil(role, x, labels, owned, self.classes, self.clients.input_noise, rng)
        y = torch.from_numpy(labels).to(self.device)
        if self.reads_test:
            x, y = (torch.cat(pair) for pair in zip((x, y), self.test, strict=True))
        return Workbench(self.net, x, y, self.chunk, self._other_widths)

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the data set's test part; ``split.server_test`` of it is the server's test set."""
        labels = torch.from_numpy(self.dataset.test.y).to(self.device)
        return self._standardised(self.dataset.test), labels

    def _standardised(self, examples: Examples) -> Tensor:
        x = torch.from_numpy(examples.x).to(self.device, self.dtype)
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean = torch.tensor(self.scale.mean, device=self.device, dtype=self.dtype).reshape(shape)
        std = torch.tensor(self.scale.std, device=self.device, dtype=self.dtype).reshape(shape)
        return laid_out(x.sub_(mean).div_(std) if x.data_ptr() != examples.x.ctypes.data else (x - mean) / std)

    @cached_property
    def example_bytes(self) -> int:
        """Bytes of one raw example and its label, as it would be sent."""
        return int(self.dataset.train.x[0].nbytes + self.dataset.train.y[0].nbytes)

    @property
    def forward_macs(self) -> int:
        """Multiply–accumulates of one example's forward pass through the net at full width."""
        return self.macs_at(1.0)

    def macs_at(self, width: float) -> int:
        """Multiply–accumulates of one example's forward pass through the net of a width."""
        if width not in self._macs:
            examples = torch.zeros(2, *self.dataset.train.x.shape[1:], device=self.device, dtype=self.dtype)
            self._macs[width] = forward_macs(self.net_at(width), examples)
        return self._macs[width]

    def macs_of(self, passes: Mapping[float, int]) -> int:
        """Multiply–accumulates of so many examples' passes through the net, by its width."""
        return sum(number * self.macs_at(width) for width, number in passes.items())

    @cached_property
    def widths(self) -> tuple[float, ...]:
        """The width of the net that each client can run."""
        several = len(self.dataset.domains) > 1
        return self.clients.widths(self.seed, self.split.client_domains if several else None)

    @cached_property
    def _macs(self) -> dict[float, int]:
        return {}


def initial_model(net: nn.Module, device: torch.device, dtype: torch.dtype) -> Model:
    """The module's own tensors as a :class:`Model`; parameters shared by two names are refused.

    Raises:
        ConfigError: tied parameters, which a name → tensor dict cannot keep tied.
    """
    params = {n: p.detach().to(device, dtype).clone() for n, p in net.named_parameters()}
    if len(params) != len(list(net.named_parameters(remove_duplicate=False))):
        raise ConfigError("model", "parameters tied under two names are not supported.")
    buffers = {
        n: b.to(device, dtype).clone() if b.is_floating_point() else b.to(device).clone()
        for n, b in net.named_buffers()
    }
    return Model(params, buffers)


def check_net(federation: Federation) -> None:
    """One forward pass, so that a net that does not fit the data is refused before any work.

    Raises:
        ConfigError: the pass fails or does not give ``(b, classes)``.
    """
    shape = tuple(federation.dataset.train.x.shape[1:])
    x = torch.zeros(2, *shape, device=federation.device, dtype=federation.dtype)
    model = federation.start
    federation.net.eval()
    try:
        with torch.no_grad():
            out = torch.func.functional_call(federation.net, {**model.params, **model.buffers}, (x,))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError("model", f"the net does not accept examples of shape {shape}: {error}") from error
    if tuple(out.shape) != (2, federation.classes):
        problem = f"gives {tuple(out.shape)} for 2 examples; expected logits (2, {federation.classes})."
        raise ConfigError("model", problem)
