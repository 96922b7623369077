"""Everything that can be known, and refused, before the first round: from a composed config to a federation.

A plan also knows the run's name: see :mod:`hybridfl.identity`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from hybridfl.availability import Clients
from hybridfl.behaviour import SPOILT
from hybridfl.build import NonNegativeFloat, NonNegativeInt, PositiveInt, build, call, of_kind
from hybridfl.claims import Claim
from hybridfl.config import Composed
from hybridfl.data.augmentation import Augmenter
from hybridfl.data.classes import only_classes
from hybridfl.data.dataset import Dataset, Reader, sound
from hybridfl.data.partitioning import Partitioning
from hybridfl.data.server_data import ServerData
from hybridfl.data.split import Drawn, draw_split
from hybridfl.devices import device_of
from hybridfl.engine import WITH_DATA, Engine, check_method
from hybridfl.errors import ConfigError
from hybridfl.evaluation import Evaluation
from hybridfl.executors import Executor
from hybridfl.federation import Federation, check_net, initial_model
from hybridfl.identity import digest_of
from hybridfl.models.batch_norm import with_policy
from hybridfl.models.building import build_net
from hybridfl.models.files import Weights, read_weights
from hybridfl.models.options import separated
from hybridfl.models.precision import lowered
from hybridfl.optimizers import LocalWork
from hybridfl.preset_sweeps import PresetSweep, sweep_at
from hybridfl.tasks import Tasks
from hybridfl.trackers import Tracker
from hybridfl.trackers.none import NoTracker
from hybridfl.tuned import misplaced
from hybridfl.types import SERVER, Method, Model

MOST_PARTS = 4
"""Parts of data sets that are kept at a time."""
STARTS = ("random", "server", "solo")
"""Values of ``start`` beside the name of a file."""


class Topology(Protocol):
    """A config node of the group ``topology``; one of peers has ``mixing`` too, see :mod:`hybridfl.topology`."""

    def name_for(self, method: Method) -> str: ...


@dataclass(frozen=True)
class Settings:
    """The top of the config; the names are the keys, see ``conf/config.yaml``."""

    dataset: Reader
    partitioning: Partitioning
    server_data: ServerData
    clients: Clients
    client_optimizer: LocalWork
    augmentation: Augmenter
    topology: Topology
    executor: Executor
    tracker: Tracker = field(default_factory=NoTracker)
    seed: NonNegativeInt = 0
    rounds: PositiveInt = 60
    start: str = "random"
    start_steps: PositiveInt = 200
    initial: Literal["same", "different"] = "same"
    classes: tuple[NonNegativeInt, ...] | str | None = None
    tasks: Tasks = field(default_factory=Tasks)
    evaluate_every: PositiveInt = 1
    evaluation: Evaluation = field(default_factory=Evaluation)
    dtype: Literal["float32", "float64"] = "float32"
    mixed_precision: Literal["none", "bfloat16"] = "none"
    tf32: bool = False
    device: str = "auto"
    max_bad_rounds: PositiveInt = 3
    checkpoint_seconds: NonNegativeFloat = 20.0
    output_dir: str = "outputs"
    data_root: str = "~/.cache/hybridfl"
    ui: Literal["rich", "plain", "none"] = "rich"
    rerun: bool = False
    fail_fast: bool = False
    tuned: dict[str, dict[str, Any]] | None = None
    claims: tuple[Claim, ...] = ()
    scale: str | None = None
    sweeps: dict[str, PresetSweep] = field(default_factory=dict)


@dataclass
class DataCache:
    """Data sets already read, so that the jobs of a sweep read each once."""

    kept: dict[tuple[str, str], Dataset] = field(default_factory=dict)
    parts: dict[str, Dataset] = field(default_factory=dict)

    def part(self, key: str, made: Callable[[], Dataset]) -> Dataset:
        """A data set made from one of those, so that its fingerprint too is taken once."""
        if key not in self.parts:
            self.parts = {**dict(list(self.parts.items())[1 - MOST_PARTS :]), key: made()}
        return self.parts[key]

    def load(self, node: Mapping[str, Any], reader: Reader, root: Path, place: str = "dataset") -> Dataset:
        """What ``reader`` reads, which was built from ``node``; a reader itself may not tell its options.

        Args:
            place: where the node stands in the config, for messages.
        """
        key = (json.dumps(node, sort_keys=True, default=str), str(root))
        if key not in self.kept:
            try:
                self.kept[key] = sound(reader.load(root), node)
            except ConfigError as error:
                raise error.under(place) from error
        return self.kept[key]


@dataclass(frozen=True, eq=False)
class Plan:
    """A run that has been checked and can start.

    Attributes:
        composed: the config as composed.
        drawn: the data, and who owns what of them; in the federation too.
        digest: names the run: 12 hex digits of its identity.
        notes: what the user should know about the run before it starts.
    """

    composed: Composed
    settings: Settings
    drawn: Drawn
    federation: Federation
    method: Method
    digest: str
    notes: tuple[str, ...] = ()

    def engine(self) -> Engine:
        return Engine(
            self.federation,
            self.method,
            self.settings.executor,
            self.settings.rounds,
            self.settings.max_bad_rounds,
            "server" if self.settings.start == "server" else "solo" if self.settings.start == "solo" else None,
            self.settings.start_steps,
        )

    def stored_config(self) -> dict[str, Any]:
        """What ``config.yaml`` of the run holds; ``tuned`` is what was applied, the settings themselves are in their places."""
        left_out = {"merging", "baseline", "claims", "scale", "sweeps"} | (
            set() if self.composed.config.get("tuned") else {"tuned"}
        )
        config = {k: v for k, v in self.composed.config.items() if k not in left_out}
        facts: dict[str, Any] = {"name": self.composed.method_name, "moves_raw_data": self.method.moves_raw_data}
        if self.method.upper_bound:
            facts["upper_bound"] = True
        method = dict(self.composed.config[self.composed.method_key]) | facts
        return config | {"method": method, "overrides": self.composed.line, "digest": self.digest}


def settings_of(composed: Composed) -> tuple[Settings, Method]:
    """Every node built and checked but the model, which needs the data's shape.

    Raises:
        ConfigError: a key, type, value or choice is wrong.
    """
    config = dict(composed.config)
    nodes = {name: config.pop(name, None) or {} for name in ("merging", "baseline")}
    config.pop("experiment", None)
    if not isinstance(config.pop("model", None), Mapping):
        raise ConfigError("model", "expected a config group with a _target_.")
    with _as_tuned(composed):
        methods = {
            name: of_kind(build(node, name), Method, name)
            for name, node in nodes.items()
            if node or name == composed.method_key
        }
        settings: Settings = call(Settings, config, "", {})
    sweep_at(config)
    return settings, methods[composed.method_key]


def make_plan(composed: Composed, cache: DataCache | None = None) -> Plan:
    """Check everything, read the data, draw the split, build the net.

    Raises:
        ConfigError: before any work, naming key, value and nearest valid choice.
        DataError: a data file is missing or broken.
    """
    with _as_tuned(composed):
        return _planned(composed, cache)


def _planned(composed: Composed, cache: DataCache | None) -> Plan:
    settings, method = settings_of(composed)
    with _under("client_optimizer.schedule"):
        settings.client_optimizer.schedule.check(settings.rounds)
    drawn = draw(composed, settings, cache)
    dataset = drawn.dataset
    # One of several processes may have a device of its own.
    own_device = getattr(settings.executor, "device", lambda name: name)
    device, dtype = device_of(own_device(settings.device)), getattr(torch, settings.dtype)
    low = settings.mixed_precision != "none"
    if low and settings.dtype == "float64":
        problem = f"got {settings.mixed_precision} with dtype=float64; nearest valid choice: none."
        raise ConfigError("mixed_precision", problem)
    if check := getattr(settings.executor, "check", None):
        check(device)
    settings.tracker.check()
    options, node = separated(composed.config["model"])
    scale = options.scale(dataset)
    with _under("augmentation"):
        augment = settings.augmentation.fitted(replace(dataset, mean=scale.mean, std=scale.std))
    net = build_net(node, dataset, settings.seed).to(device, dtype)
    weights = Weights(initial_model(net, device, dtype), ())

    def build_at(width: float, name: str) -> nn.Module:
        net = with_policy(build_net(node, dataset, settings.seed, width, name), options.batch_norm)
        return lowered(net) if low else net

    file = None if settings.start in STARTS else Path(settings.start).expanduser()
    if file is not None and settings.initial != "same":
        raise ConfigError("initial", f"got {settings.initial}, but start={settings.start} is the same for all.")
    if file is not None:
        used = {name for name, _ in with_policy(net, options.batch_norm).named_buffers()}
        unused = weights.model.buffers.keys() - used
        weights = read_weights(file, weights.model, getattr(net, "key_map", None), unused)
    net = with_policy(net, options.batch_norm)
    if low:
        net = lowered(net)
    kept = {name: weights.model.buffers[name] for name, _ in net.named_buffers()}
    federation = Federation(
        dataset=dataset,
        pool=drawn.pool,
        split=drawn.split,
        clients=settings.clients,
        net=net,
        work=settings.client_optimizer,
        provides=drawn.provides,
        seed=settings.seed,
        device=device,
        dtype=dtype,
        chunk=settings.evaluation.chunk,
        start=Model(weights.model.params, kept),
        build=build_at,
        tasks=drawn.tasks,
        model_options=options,
        scale=scale,
        started=settings.start != "random",
        initial=settings.initial,
        topology=settings.topology if settings.topology.name_for(method) == "peers" else None,
        reads_test=method.upper_bound,
        augment=augment,
    )
    check_net(federation)
    spoilt = [role for role in SPOILT if role in federation.roles.values()]
    if spoilt and drawn.split.is_shared:
        problem = (
            f"got {getattr(settings.clients, spoilt[0]):g}: clients share examples, and others would get the noise too"
        )
        raise ConfigError(f"clients.{spoilt[0]}", f"{problem}; nearest valid value: 0.")
    labels_by = getattr(settings.server_data, "labels_by", WITH_DATA)
    if settings.start == "server" and "server_labels" not in federation.provides:
        raise ConfigError("start", f"got server, but the server owns no labelled examples; try {labels_by}.")
    if settings.start == "server" and not federation.by_task(SERVER)[0]:
        raise ConfigError("start", "got server, but the server has no training example of the first task; try random.")
    key = composed.method_key
    check_method(method, federation, settings.topology.name_for(method), f"{key}={composed.method_name}", labels_by)
    if method.topology == "peers":
        with _under("topology"):
            federation.mixing(0)
    try:
        method.init(federation)
    except ConfigError as error:
        # What does not suit the method may be no option of its own, but one of the run, such as the model.
        refused = error.key.partition(".")[0]
        if refused in composed.config and refused not in composed.config[key]:
            raise
        raise error.under(key) from error
    told = getattr(method, "notes", None)
    notes = (*weights.notes, *(told(federation) if told else ()))
    digest = digest_of(composed, dataset, drawn.sources, files_of(settings))
    return Plan(composed, settings, drawn, federation, method, digest, notes)


def digest_before_draw(composed: Composed, cache: DataCache) -> str | None:
    """The digest that the plan would have, for runs that have been checked: the data are read, and nothing is drawn.

    None where only the drawing tells which further data sets are read.

    Raises:
        ConfigError: a key, type, value or choice is wrong.
        DataError: a data file is missing or broken.
    """
    with _as_tuned(composed):
        settings, _ = settings_of(composed)
        server = settings.server_data
        reads = any(hasattr(option, "load") for option in getattr(server, "__dict__", {}).values())
        if reads or not type(server).__module__.startswith("hybridfl."):
            return None
        dataset = dataset_of(composed, settings, cache)
        try:
            return digest_of(composed, dataset, (), files_of(settings))
        except OSError:  # a file that is not there, which the plan explains
            return None


def files_of(settings: Settings) -> dict[str, Path]:
    """Files whose contents decide the numbers, by the keys of the options that name them."""
    files = {} if settings.start in STARTS else {"start": Path(settings.start).expanduser()}
    return files | {f"partitioning.{name}": path for name, path in getattr(settings.partitioning, "files", {}).items()}


@contextmanager
def _as_tuned(composed: Composed) -> Iterator[None]:
    """What is refused within is named as the preset has it, if it was tuned there."""
    try:
        yield
    except ConfigError as error:
        placed = misplaced(error, composed.config.get("tuned") or {}, composed.method_key)
        if placed is None:
            raise
        raise placed from error


@contextmanager
def _under(key: str) -> Iterator[None]:
    """What is refused within is an option of this node."""
    try:
        yield
    except ConfigError as error:
        raise error.under(key) from error


def draw(composed: Composed, settings: Settings, cache: DataCache | None = None) -> Drawn:
    """The data, and who owns what of them.

    Raises:
        ConfigError: an option of the data set, the partitioning, the server's data or the clients does not fit.
        DataError: a data file is missing or broken.
    """
    cache, root = cache or DataCache(), Path(settings.data_root).expanduser()
    servers = composed.config["server_data"]

    def load(option: str) -> Dataset:
        # A reader that is an option's default stands nowhere in the config.
        node = servers.get(option, {"_target_": f"{servers['_target_']}.{option}"})
        return cache.load(node, getattr(settings.server_data, option), root, option)

    dataset = dataset_of(composed, settings, cache)
    return draw_split(
        dataset,
        settings.partitioning,
        settings.server_data,
        settings.clients.number,
        settings.clients.validation,
        settings.evaluation.min_test,
        settings.seed,
        load,
        settings.tasks.stream(dataset.classes, settings.rounds, settings.seed),
    )


def dataset_of(composed: Composed, settings: Settings, cache: DataCache) -> Dataset:
    """The data of the clients' task, with the classes and as many test examples as there are to be.

    Raises:
        ConfigError: an option of the data set, ``classes`` or ``evaluation.limit``.
        DataError: a data file is missing or broken.
    """
    node = composed.config["dataset"]
    whole = cache.load(node, settings.dataset, Path(settings.data_root).expanduser())
    if whole.classes < 2:
        problem = f"got {whole.name}, which has one class only, and nothing to tell it from; two are needed at least."
        raise ConfigError("dataset", problem)

    def part() -> Dataset:
        chosen = whole if settings.classes is None else only_classes(whole, settings.classes)
        return settings.evaluation.limited(chosen)

    if settings.classes is None and settings.evaluation.limit is None:
        return whole
    key = [node, settings.data_root, settings.classes, settings.evaluation.limit]
    return cache.part(json.dumps(key, sort_keys=True, default=str), part)
