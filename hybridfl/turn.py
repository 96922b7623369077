"""One round under way: what a method asks for, who does it, what comes back and what it costs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from hybridfl import params as P
from hybridfl.assignment import name_of, task_of
from hybridfl.behaviour import random_update
from hybridfl.costs import returned, sent
from hybridfl.errors import HybridflError
from hybridfl.executors import Executor, told
from hybridfl.federation import Federation
from hybridfl.kept import as_seen, keeping, own, picked
from hybridfl.local import Outcome, Task
from hybridfl.rng import stream
from hybridfl.schedule import Arrival, Schedule
from hybridfl.snapshot import InFlight, Snapshot
from hybridfl.types import SERVER, Job, Method, Model, Result, Results, Round, State


class Abandoned(Exception):
    """The round cannot go on; the state stays as it was."""

    def __init__(self, reason: str, diverged: bool = False) -> None:
        super().__init__(reason)
        self.diverged = diverged


class Turn:
    """One round under way."""

    def __init__(
        self,
        federation: Federation,
        method: Method,
        executor: Executor,
        schedule: Schedule,
        rounds: int,
        before: Snapshot,
    ) -> None:
        self.federation, self.method, self.executor = federation, method, executor
        self.schedule, self.rounds = schedule, rounds
        self.index = before.round
        self.state = before.state
        self.in_flight = list(before.in_flight)
        self.costs = before.costs
        self.moved = set(before.moved)
        self.kept = before.kept
        self.notes: list[str] = []
        self.bad = False
        self.born = schedule.born(self.index)
        self.occurrences: dict[tuple[int, str], int] = defaultdict(int)
        self.now = Round(
            index=self.index,
            total=rounds,
            clients=[arrival.client for arrival in self.born],
            cohort=self.federation.clients.cohort_of(self.index)
            if self.federation.topology is None
            else len(self.born),
            work=self.federation.work,
            seed=self.federation.seed,
            task=self.federation.tasks.at(self.index),
            first_of_task=self.federation.tasks.begins(self.index),
            last_of_task=self.federation.tasks.ends(self.index),
            mixing=None if self.federation.topology is None else self.federation.mixing(self.index),
            kept=self.federation.kept_names,
        )

    def drive(self) -> State:
        """Exchange jobs for results until the method returns its new state."""
        conversation: Any = self.method.round(self.state, self.now)
        if not isinstance(conversation, Generator):
            name = type(self.method).__name__
            raise HybridflError(f"{name}.round must yield lists of jobs; it returned {kind(conversation)} at once.")
        try:
            jobs = self.jobs(next(conversation))
            while self.born and jobs and all(job.participant == SERVER or job.is_measurement for job in jobs):
                # The clients' work is still to come, and may wait for what is found here.
                jobs = self.jobs(conversation.send(self.later(jobs)))
            results = self.first(jobs)
            while True:
                results = self.later(self.jobs(conversation.send(results)))
        except StopIteration as stop:
            new: State = stop.value
            return new
        finally:
            conversation.close()

    def jobs(self, yielded: Any) -> list[Job]:
        """What the method yielded, if it is a list of jobs."""
        if isinstance(yielded, list) and all(isinstance(job, Job) and isinstance(job.start, Model) for job in yielded):
            return yielded
        name = type(self.method).__name__
        raise HybridflError(f"{name}.round must yield lists of Job(participant, Model); it yielded {kind(yielded)}.")

    def first(self, jobs: list[Job]) -> Results:
        """Hand out the jobs born now; return what is due now."""
        outcomes = self.run(jobs)
        counted_on: list[tuple[Job, Outcome]] = []
        births: dict[int, list[Arrival]] = defaultdict(list)
        for arrival in self.born:
            births[arrival.client].append(arrival)
        waiting: dict[tuple[int, str], list[Arrival]] = {}
        due = [(r.slot, r.order, r.result, r.upload) for r in self.in_flight if r.arrival == self.index]
        self.in_flight = [r for r in self.in_flight if r.arrival > self.index]
        lost = 0
        for order, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True)):
            if job.participant == SERVER or job.is_measurement:
                counted_on.append((job, outcome))
                continue
            key = (job.participant, job.tag)
            if key not in waiting:
                waiting[key] = list(births[job.participant])
            # The n-th job of a client and tag belongs to the client's n-th birth of this round.
            if waiting[key]:
                arrival = waiting[key].pop(0)
            else:
                arrival = Arrival(self.index, len(self.born) + order, job.participant)
            lost += arrival.lost
            result = None if arrival.lost else self.sound(job, outcome)
            upload = returned(job, outcome.result, self.federation.kept_names)
            if arrival.round == self.index:
                due.append((arrival.slot, order, result, upload))
                continue
            if result is not None:
                result.write_out()  # as a checkpoint would: a run that goes on from one adds up the same numbers
            self.in_flight.append(InFlight(arrival.round, arrival.slot, order, result, upload))
        due.sort(key=lambda arrival: arrival[:2])
        arrived = Results(result for _, _, result, _ in due if result is not None)
        self.costs = self.costs.plus(bytes_up=sum(upload for _, _, result, upload in due if result is not None))
        if lost:
            self.notes.append(f"round {self.index + 1}: results lost on the way: {lost}")
        # Where everybody has dropped out, or never started, a method that asked nobody else has nothing to go on with; but
        # one may choose to ask nobody.
        chose_nobody = self.born and not jobs
        if not arrived and (due or not (counted_on or chose_nobody)):
            raise Abandoned("no client's result came back")
        # Last, because one that is not usable ends the round, and those that arrive later must be on their way by then.
        return Results([*arrived, *(self.deliver(job, outcome) for job, outcome in counted_on)])

    def later(self, jobs: list[Job]) -> Results:
        """Jobs that wait for nobody; a client whose result is not finite drops out."""
        results = Results()
        for job, outcome in zip(jobs, self.run(jobs), strict=True):
            if job.participant == SERVER or job.is_measurement:
                results.append(self.deliver(job, outcome))
                continue
            result = self.sound(job, outcome)
            if result is not None:
                self.pay_upload(job, result)
                results.append(result)
        if jobs and not results:
            raise Abandoned("no client's result came back")
        return results

    def deliver(self, job: Job, outcome: Outcome) -> Result:
        """A result that a method counts on; without it the round cannot go on."""
        result = self.sound(job, outcome)
        if result is None:
            raise Abandoned(f"{name_of(job.participant)} returned nothing usable")
        self.pay_upload(job, result)
        return result

    def sound(self, job: Job, outcome: Outcome) -> Result | None:
        """The result if it is finite; otherwise it is dropped and said so."""
        if _finite(job, outcome):
            return outcome.result
        self.bad = True
        self.notes.append(
            f"round {self.index + 1}: {name_of(job.participant)} returned a non-finite loss, update or statistic; dropped"
        )
        return None

    def run(self, jobs: list[Job]) -> list[Outcome]:
        names = self.federation.kept_names
        tasks = [self.task(self.at_home(job)) for job in jobs]
        # A participant that is sent the same tensors for two jobs in one yield gets them once.
        parcels: dict[tuple[int, int], list[Job]] = defaultdict(list)
        for job in jobs:
            parcels[(SERVER if job.source is None else job.source, job.participant)].append(job)
        sizes: dict[int, int] = {}
        more: dict[str, int] = defaultdict(int)
        for (sender, receiver), parcel in parcels.items():
            if sender != receiver:
                more[_channel(sender, receiver)] += _size(parcel, names, sizes)
        outcomes = self.executor.run(self.federation.bench, tasks)
        self.notes += [f"round {self.index + 1}: {text}" for text in told(self.executor)]
        if names:
            outcomes = [self.keep(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]
        outcomes = [self.told(task, outcome) for task, outcome in zip(tasks, outcomes, strict=True)]
        for job, outcome in zip(jobs, outcomes, strict=True):
            macs = self.federation.macs_of(outcome.passes) + outcome.mapped
            more["macs"] += macs
            if job.participant == SERVER:
                more["server_macs"] += macs
            else:
                more["local_steps"] += outcome.result.steps
        self.costs = self.costs.plus(**more)
        return outcomes

    def at_home(self, job: Job) -> Job:
        """The job as its participant does it: from what it has kept to itself."""
        if not self.federation.kept_names or job.participant == SERVER:
            return job
        tag = job.tag
        if job.is_measurement and tag not in self.kept.get(str(job.participant), {}):
            tag = ""  # it keeps nothing itself, and looks at the model that is trained
        return replace(job, start=own(job.start, self.kept, job.participant, tag))

    def keep(self, job: Job, outcome: Outcome) -> Outcome:
        """The outcome as the method sees it; what the participant keeps to itself is remembered."""
        if job.participant == SERVER:
            return outcome
        names, result = self.federation.kept_names, outcome.result
        if not _finite(job, outcome):
            return outcome  # not to be used, nor to start from again
        if not job.is_measurement:
            self.kept = keeping(self.kept, job.participant, job.tag, picked(result.model, names))
        return replace(outcome, result=as_seen(job.start, result, names))

    def told(self, task: Task, outcome: Outcome) -> Outcome:
        """What the participant says it found: some send noise instead of their update."""
        job, role = task.job, self.federation.roles.get(task.job.participant)
        if role != "random_updates" or job.returns != "all":
            return outcome
        # The task's own seed tells apart all jobs of a run.
        rng = stream(self.federation.seed, "random updates", task.torch_seed)
        noise = random_update(outcome.result, self.federation.clients.random_scale, rng)
        return replace(outcome, result=as_seen(outcome.result.start, noise, self.federation.kept_names))

    def task(self, job: Job) -> Task:
        self.move_raw_data(job)
        n = self.occurrences[(job.participant, job.tag)]
        self.occurrences[(job.participant, job.tag)] += 1
        return task_of(self.federation, job, self.index, self.rounds, n)

    def move_raw_data(self, job: Job) -> None:
        """Book the examples that a job reads and its participant does not own, once for each owner."""
        if job.view.split == "test" and not self.method.upper_bound:
            raise HybridflError(f"{type(self.method).__name__} reads test data without upper_bound.")
        foreign = [owner for owner in job.view.owners or () if owner != job.participant]
        if foreign and not self.method.moves_raw_data:
            raise HybridflError(f"{type(self.method).__name__} reads others' data without moves_raw_data.")
        for owner in foreign:
            parcel = (owner, job.participant, job.view.split)
            if parcel in self.moved:
                continue
            self.moved.add(parcel)
            size = self.federation.example_bytes * self.federation.examples(owner, job.view.split)
            self.costs = self.costs.plus(**{_channel(owner, job.participant): size})

    def pay_upload(self, job: Job, result: Result) -> None:
        if job.participant != SERVER:
            self.costs = self.costs.plus(bytes_up=returned(job, result, self.federation.kept_names))


def _size(parcel: list[Job], kept: frozenset[str], known: dict[int, int]) -> int:
    """Bytes of what a participant is sent; that of a model alone, which most often all are sent, is reckoned once."""
    job = parcel[0]
    if len(parcel) > 1 or job.source is None or job.frozen or job.ctx or job.optimizer_state:
        return sent(*parcel, kept=kept)
    if id(job.start) not in known:
        known[id(job.start)] = sent(job, kept=kept)
    return known[id(job.start)]


def _finite(job: Job, outcome: Outcome) -> bool:
    """Whether a result can be used; a measurement has no loss."""
    result = outcome.result
    if not (job.is_measurement or math.isfinite(result.loss)):
        return False
    if outcome.finite:
        return not result.probes or P.all_finite(result.probes)
    return P.all_finite([result.model, result.probes])


def kind(value: Any) -> str:
    inside = f" of {', '.join(sorted({type(item).__name__ for item in value}))}" if isinstance(value, list) else ""
    return f"{type(value).__name__}{inside}"


def _channel(sender: int, receiver: int) -> str:
    if receiver == SERVER:
        return "bytes_up"
    return "bytes_down" if sender == SERVER else "bytes_peer"
