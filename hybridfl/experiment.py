"""One run from its start, or from where it stopped, to its end; everything it makes is on disk as soon as it exists."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from hybridfl import __version__, checkpoints
from hybridfl.costs import Costs
from hybridfl.engine import Engine, Record
from hybridfl.errors import HybridflError
from hybridfl.evaluation import Evaluator, Row
from hybridfl.executors import Executor
from hybridfl.group import Group
from hybridfl.plan import Plan
from hybridfl.progress import Progress
from hybridfl.rendezvous import RankFailed
from hybridfl.runs import read_run
from hybridfl.snapshot import InFlight, Snapshot
from hybridfl.store import RunFolder, claim, log, read_status, write_status, write_text_atomic
from hybridfl.tables import Table
from hybridfl.trackers import Ending, Tracked
from hybridfl.tracking import Tracking
from hybridfl.types import Result

METRICS = (
    "round",
    "scope",
    "accuracy",
    "loss",
    "worst10",
    "spread",
    "examples",
    "parameters",
    "inference_macs",
    *(f.name for f in fields(Costs)),
    "seconds",
    "sim_seconds",
)
REPORTS = ("round", "name", "participant", "value")
CLIENTS = ("round", "client", "accuracy", "loss", "examples")


class RunFailed(HybridflError):
    """A run that failed: what to tell, and its folder."""

    def __init__(self, path: Path, error: Exception) -> None:
        foreseen = isinstance(error, HybridflError)
        where = "" if foreseen else f"; the traceback is in {path / 'log.txt'}"
        super().__init__(_reason(error) + where)
        self.path = path
        self.exit_status = error.exit_status if isinstance(error, HybridflError) else 1


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, HybridflError) else f"{type(error).__name__}: {error}"


def run(plan: Plan, progress: Progress) -> Path:
    """Do the run, continue it, or find it done; its folder.

    Raises:
        RunFailed: the reason is in its ``status.json`` and ``log.txt`` too.
        KeyboardInterrupt: it was stopped; the last complete round is in a checkpoint.
    """
    settings = plan.settings
    with claim(Path(settings.output_dir), plan.digest, settings.rerun, progress.note) as folder:
        if folder.done:
            _group(plan).share(_DONE)
            progress.note(f"{_title(plan)}: already done: {read_run(folder.path).summary()}")
            return folder.path
        attempt = _Attempt(plan, folder, progress)
        try:
            with same_numbers(settings.executor.threads, settings.tf32), _entered(settings.executor):
                attempt.work()
        except KeyboardInterrupt:
            attempt.interrupted()
            raise
        except Exception as error:
            attempt.failed(error)
            raise RunFailed(folder.path, error) from error
        return folder.path


def follow(plan: Plan) -> None:
    """The same run on a rank other than the first: all of its rounds, and nothing on disk.

    Raises:
        HybridflError: what went wrong, here or on another rank.
        KeyboardInterrupt: it was stopped, here or there.
    """
    group = _group(plan)
    snapshot = group.share()
    if snapshot != _DONE:
        engine = plan.engine()
        with same_numbers(plan.settings.executor.threads, plan.settings.tf32), _entered(plan.settings.executor):
            snapshot = _begun(engine, group) if snapshot is None else snapshot
            while snapshot.round < engine.rounds:
                snapshot, _ = _stepped(engine, snapshot, group)
    group.wait_for_the_first()


_DONE = "done"
"""What rank 0 sends in place of a checkpoint when there is nothing to do."""
_ALONE = Group()


def _group(plan: Plan) -> Group:
    """The processes that do the run together."""
    group: Group = getattr(plan.settings.executor, "group", _ALONE)
    return group


def _entered(executor: Executor) -> AbstractContextManager[Any]:
    """What it keeps between rounds, such as processes, is there within the block."""
    return executor if isinstance(executor, AbstractContextManager) else nullcontext()


@contextmanager
def same_numbers(threads: int, tf32: bool = False) -> Iterator[None]:
    """So many threads of an operation, and on a GPU the same algorithms every time, in TF32 only where it is asked for."""
    before, matmul = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        # The fastest algorithm of the moment would give other numbers at another one.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cuda.matmul.allow_tf32 = matmul


def _begun(engine: Engine, group: Group) -> Snapshot:
    snapshot = engine.begin()
    return group.agreed(snapshot, of=snapshot)


def _stepped(engine: Engine, before: Snapshot, group: Group) -> tuple[Snapshot, Record]:
    """A round, after which all ranks have the same snapshot."""
    after, record = engine.step(before)
    # Of the round's own time every rank has its own measure.
    return group.agreed(after, of=replace(after, seconds=0.0)), record


class _Attempt:
    """A run under way in a folder that this process holds."""

    def __init__(self, plan: Plan, folder: RunFolder, progress: Progress) -> None:
        self.plan, self.folder, self.progress = plan, folder, progress
        self.rounds = plan.settings.rounds
        self.snapshot: Snapshot | None = None
        self.saved = -1
        self.drifted = False
        self.tables: tuple[Table, ...] = ()
        self.tracking: Tracking | None = None

    def work(self) -> None:
        plan = self.plan
        loaded = checkpoints.load_latest(self.folder.checkpoints, plan.federation.device, self._note)
        if loaded:
            self.snapshot, self.saved = unpacked(loaded[1]), loaded[0]
            self._warn_of_another_machine()
        group = _group(plan)
        group.share(self.snapshot)
        self._status("running", loaded[0] if loaded else 0)
        self._describe()
        engine = plan.engine()
        self._log(f"continues after round {self.saved}" if loaded else f"starts: {plan.composed.line or '(defaults)'}")
        self._log(
            f"split {plan.federation.split.digest}, {plan.federation.split.moved} examples moved to small clients"
        )
        if self.snapshot is None:
            for note in plan.notes:
                self._note(note)
            self.snapshot = _begun(engine, group)
            checkpoints.pack(self.snapshot.state)  # a state that cannot be stored is refused before the first round
        self._open_tables(loaded[0] if loaded else 0)
        tracked = Tracked(self.folder.path, plan.stored_config())
        self.tracking = Tracking(plan.settings.tracker, tracked, self._note, after=self.snapshot.round)
        if about := getattr(plan.settings.executor, "about", None):
            self._log(f"executor {about(plan.federation.bench)}")
        evaluator = Evaluator(plan.federation, plan.method, plan.settings.evaluation)
        about = f"split {plan.federation.split.digest}"
        about += f", {group.size} ranks" if group.size > 1 else ""
        self.progress.start(_title(plan), self.rounds, self.snapshot.round, about)
        last_save = time.monotonic()
        while self.snapshot.round < self.rounds:
            after, record = _stepped(engine, self.snapshot, group)
            if self.snapshot.round == 0:
                checkpoints.pack(after.state)  # nor after it, rather than at the first checkpoint
            if group.drifted and not self.drifted:
                self.drifted = True
                self._note("the ranks' numbers differ in their last digits: all of them go on with those of rank 0")
            accuracy = self._commit(after, record, evaluator)
            self.snapshot = after
            costs = after.costs
            self.progress.round(after.round, accuracy, costs.bytes_up + costs.bytes_down + costs.bytes_peer)
            if time.monotonic() - last_save > plan.settings.checkpoint_seconds:
                self._save()
                self._status("running", after.round)
                last_save = time.monotonic()
        self._save()
        self._report_differences()
        self._status("done", self.rounds)
        self._log("done")
        self._end_tracking("done")
        self.progress.finish(f"done: {read_run(self.folder.path).summary()}")

    def interrupted(self) -> None:
        """Keep the last complete round; the one under way is lost."""
        done = self.snapshot.round if self.snapshot else 0
        try:
            self._save()
            self._log(f"interrupted after round {done}")
            self._status("interrupted", done)
            self._end_tracking("interrupted")
        except HybridflError as error:  # a full disk: the checkpoint before still counts
            self.progress.note(str(error))
        self.progress.finish(f"interrupted after round {done} of {self.rounds}; the same command continues it")

    def failed(self, error: Exception) -> None:
        """Keep the last complete round and say why, in the run's own folder; a full disk must not hide the first error."""
        done = self.snapshot.round if self.snapshot else 0
        reason = _reason(error)
        told = error.detail if isinstance(error, RankFailed) else reason
        detail = told if isinstance(error, HybridflError) else traceback.format_exc()
        try:
            self._log(f"failed: {detail}")
            self._status("failed", done, reason)
            self._save()
            self._end_tracking("failed")
        except HybridflError as second:
            if str(second) != reason:
                self.progress.note(str(second))

    def _commit(self, after: Snapshot, record: Record, evaluator: Evaluator) -> float | None:
        """Rows of the round on disk, those of one table in one write."""
        for line in record.notes:
            self._note(line)
        self.reports.append(
            after.round,
            [{"name": name, "participant": who, "value": value} for name, who, value in record.reports],
        )
        # What a stream has forgotten is read from the accuracies at the end of every task.
        last = self.plan.federation.tasks.ends(after.round - 1)
        if not last and after.round % self.plan.settings.evaluate_every:
            return None
        scores = evaluator.score(after.state, after.round, last, after.kept)
        clock = None if record.sim_seconds is None else round(record.sim_seconds, 6)
        costs: Row = asdict(after.costs) | {"seconds": round(after.seconds, 3), "sim_seconds": clock}
        self.clients.append(after.round, [row | self._told(record, row["client"]) for row in scores.clients])
        rows = [row | costs for row in scores.rows]
        self.metrics.append(after.round, rows)
        if self.tracking:
            self.tracking.send(after.round, rows)
        return scores.accuracy()

    def _told(self, record: Record, client: int) -> Row:
        """What the method reported of a client in this round for ``clients.csv``."""
        columns = self.plan.method.client_columns
        return {name: value for name, who, value in record.reports if who == client and name in columns}

    def _open_tables(self, after: int) -> None:
        path, method = self.folder.path, self.plan.method
        columns = [f"{kind}_{name}" for name in method.alternatives for kind in ("accuracy", "loss", "benefit")]
        self.metrics = Table(path / "metrics.csv", METRICS, after=after)
        self.reports = Table(path / "method.csv", REPORTS, after=after)
        self.clients = Table(path / "clients.csv", (*CLIENTS, *columns, *method.client_columns), after=after)
        self.tables = (self.metrics, self.reports, self.clients)

    def _end_tracking(self, ending: Ending) -> None:
        """Last of all: a tracker may wait for a network."""
        if self.tracking:
            self.tracking.end(ending)

    def _save(self) -> None:
        if self.snapshot is None or self.snapshot.round <= self.saved:
            return
        for table in self.tables:
            table.sync()
        checkpoints.save(self.folder.checkpoints, self.snapshot.round, packed(self.snapshot))
        self.saved = self.snapshot.round

    def _warn_of_another_machine(self) -> None:
        """The same numbers are promised for the same kind of device, torch and number of threads only."""
        before, now = read_status(self.folder.path) or {}, self._place()
        for name, value in now.items():
            if name in before and before[name] != value:
                self._note(f"continues with {name} {value}, began with {before[name]}: the numbers may differ slightly")

    def _place(self) -> dict[str, Any]:
        settings, device = self.plan.settings, self.plan.federation.device
        # Ranks compute what each of them would alone.
        executor = type(getattr(settings.executor, "inner", settings.executor)).__name__
        return {
            "device": str(device),
            "torch": torch.__version__,
            "executor": executor,
            "threads": settings.executor.threads,
        }

    def _describe(self) -> None:
        import yaml

        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # an eighth of a short run otherwise
        text = yaml.dump(self.plan.stored_config(), Dumper=dumper, sort_keys=False, allow_unicode=True)
        write_text_atomic(self.folder.path / "config.yaml", text)
        write_text_atomic(self.folder.path / "split.json", self._split())

    def _split(self) -> str:
        import json

        federation = self.plan.federation
        facts = {"digest": federation.split.digest, "data": federation.dataset.fingerprint}
        special: dict[str, Any] = {"noisy_clients": federation.noisy_clients, "roles": federation.roles}
        special |= {"domains": federation.dataset.domains} | federation.server_counts
        return json.dumps(facts | special | federation.split.to_json()) + "\n"

    def _status(self, status: str, done: int, error: str | None = None) -> None:
        write_status(
            self.folder.path,
            status=status,
            round=done,
            rounds=self.rounds,
            error=error,
            method=self.plan.composed.method_name,
            split=self.plan.federation.split.digest,
            version=__version__,
            **self._place(),
        )

    def _report_differences(self) -> None:
        found = [difference for table in self.tables for difference in table.differences]
        if found:
            self._note(
                f"{len(found)} values came out differently when rounds were computed again, the first: {found[0]}"
            )

    def _note(self, text: str) -> None:
        self._log(text)
        self.progress.note(f"{_title(self.plan)}: {text}")

    def _log(self, text: str) -> None:
        log(self.folder.path, text)


def _title(plan: Plan) -> str:
    return f"{plan.composed.method_name} seed={plan.settings.seed} {plan.digest}"


def packed(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as nested dicts and lists, for a checkpoint."""
    flights = [_fields(flight) | {"result": flight.result and _fields(flight.result)} for flight in snapshot.in_flight]
    return _fields(snapshot) | {
        "in_flight": flights,
        "costs": asdict(snapshot.costs),
        "moved": [list(parcel) for parcel in snapshot.moved],
    }


def unpacked(state: dict[str, Any]) -> Snapshot:
    """The snapshot a checkpoint was made of."""
    flights = [
        InFlight(**flight | {"result": flight["result"] and Result(**flight["result"])})
        for flight in state["in_flight"]
    ]
    moved = tuple((owner, receiver, split) for owner, receiver, split in state["moved"])
    return Snapshot(**state | {"in_flight": tuple(flights), "costs": Costs(**state["costs"]), "moved": moved})


def _fields(item: Any) -> dict[str, Any]:
    return {f.name: getattr(item, f.name) for f in fields(item)}
