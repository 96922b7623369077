"""``hybridfl train``: a run, a sweep of runs, or a run by several processes."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from hybridfl.command_status import reported
from hybridfl.errors import ConfigError, HybridflError
from hybridfl.group import Group
from hybridfl.overrides import HELP, add_overrides, composed_of
from hybridfl.rendezvous import INTERRUPTED
from hybridfl.world import World, world_of

if TYPE_CHECKING:
    from hybridfl.plan import Plan

SWEEP_HELP = """\
  with -m, commas and ranges make a sweep: -m baseline=none,fedavg seed=0,1,2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl train``."""
    parser.epilog = HELP + SWEEP_HELP
    add_overrides(parser)
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination of comma lists")
    parser.add_argument("--dry-run", action="store_true", help="check, show the split and the costs, run nothing")


def run(chosen: argparse.Namespace) -> int:
    """Trains and returns the exit status."""
    if world := world_of(os.environ):
        return _in_ranks(chosen, world)
    if chosen.multirun:
        return _sweep(chosen)
    return _single(chosen)


def _single(chosen: argparse.Namespace) -> int:
    composed = composed_of(chosen)
    from hybridfl.plan import make_plan

    plan = make_plan(composed)
    return _described(plan) if chosen.dry_run else _done(plan)


def _described(plan: Plan) -> int:
    from hybridfl.describe import describe

    print(describe(plan))
    return 0


def _done(plan: Plan) -> int:
    from hybridfl.experiment import run
    from hybridfl.progress import make_progress

    with make_progress(plan.settings.ui) as progress:
        path = run(plan, progress)
    print(f"run: {path.resolve()}")
    return 0


def _in_ranks(chosen: argparse.Namespace, world: World) -> int:
    """One of several processes that do a run together: rank 0 has the folder, and speaks for all of them."""
    group = Group(world)

    def work() -> int:
        try:
            return together()
        except KeyboardInterrupt:
            if group.rank == 0:
                raise
            raise SystemExit(INTERRUPTED) from None

    def together() -> int:
        plan, backend = group.planned(lambda: _ranked_plan(chosen, world), lambda made: _of_all_ranks(*made))
        executor: Any = plan.settings.executor
        with group.telling():
            if chosen.dry_run:
                return 0 if group.rank else _described(plan)
            executor.join(group, plan.federation.device, backend)
            if group.rank == 0:
                return _done(plan)
            from hybridfl.experiment import follow

            follow(plan)
            return 0

    # What there is to say is said before the others may end, as torchrun ends all when the first has failed.
    status = group.end(reported(work))
    if group.stuck:
        os._exit(status)
    return status


def _ranked_plan(chosen: argparse.Namespace, world: World) -> tuple[Plan, str]:
    """The plan, and how the ranks exchange tensors."""
    if chosen.multirun:
        problem = f"a sweep is work for one process, and this is one of {world.size}"
        raise ConfigError("-m", f"{problem}; start each of its runs under torchrun, or the sweep without torchrun.")
    composed = composed_of(chosen, quiet=world.rank > 0)
    from hybridfl.executors.ranks import Ranks
    from hybridfl.plan import make_plan

    plan = make_plan(composed)
    executor = plan.settings.executor
    if not isinstance(executor, Ranks):
        name = type(executor).__name__.lower()
        problem = (
            f"got {name}, but this is one of {world.size} processes started together (RANK and WORLD_SIZE are set)"
        )
        raise ConfigError("executor", f"{problem}; nearest valid choice: ranks.")
    return plan, executor.backend_for(plan.federation.device, plan.settings.device)


def _of_all_ranks(plan: Plan, backend: str) -> str:
    return f"{plan.digest} on {plan.federation.device.type} with {backend}"


def _sweep(chosen: argparse.Namespace) -> int:
    if chosen.dry_run:
        raise ConfigError("--dry-run", "checks one run; leave out -m. A sweep checks all its jobs before the first.")
    from hybridfl.compare import render
    from hybridfl.sweep import sweep

    finished = sweep(chosen.overrides, chosen.config_dir)
    try:
        print(render([finished.folder]))
    except HybridflError as error:  # nothing finished: the failures have been shown already
        print(f"hybridfl: {error}", file=sys.stderr)
    for text in finished.told:
        print(text)
    if finished.failed:
        print(f"hybridfl: {finished.failed} of the sweep's jobs failed.", file=sys.stderr)
    if finished.left:
        print(
            f"hybridfl: {finished.left} of the sweep's jobs are left; the same line goes on with them.", file=sys.stderr
        )
    print(f"sweep: {finished.folder.resolve()}")
    return 1 if finished.failed or finished.left else 0
