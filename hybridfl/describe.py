"""``hybridfl train --dry-run``: what would be run, who owns what, and what it would cost, without running it."""

from __future__ import annotations

import io

from rich.console import Console

from hybridfl.ownership import ownership
from hybridfl.params import nbytes
from hybridfl.plan import Plan


def describe(plan: Plan) -> str:
    """Checks passed, the split as a table, estimated bytes and memory."""
    console = Console(width=100, record=True, file=io.StringIO(), highlight=False)
    for line in _facts(plan):
        console.print(line, markup=False)
    table = ownership(plan.drawn, plan.federation.roles)
    return f"{console.export_text().rstrip()}\n\n{table}"


def _facts(plan: Plan) -> list[str]:
    federation, settings = plan.federation, plan.settings
    model = nbytes([*federation.start.params.values(), *federation.start.buffers.values()])
    cohorts = [federation.clients.cohort_of(round) for round in range(settings.rounds)]
    traffic = sum(cohorts) * model
    item = federation.start.params[next(iter(federation.start.params))].element_size()
    data = (federation.pool.x.size + federation.dataset.test.x.size) * item
    each = " to ".join(map(str, sorted({min(cohorts), max(cohorts)})))
    parameters = sum(tensor.numel() for tensor in federation.start.params.values())
    return [
        f"run        {plan.digest} ({plan.composed.method_name}), checked: it can start",
        f"data       {federation.dataset.name}, {len(federation.dataset.train)} training and "
        f"{len(federation.dataset.test)} test examples, fingerprint {federation.dataset.fingerprint}",
        f"split      {federation.split.digest}, {federation.split.moved} examples moved to clients below the minimum",
        f"model      {parameters:,} parameters, {federation.forward_macs:,} MACs a forward pass",
        f"rounds     {settings.rounds} of {each} client updates, on {federation.device}",
        f"estimate   {traffic / 1e6:.1f} MB down and {traffic / 1e6:.1f} MB up if every update is one model; "
        f"{data / 1e6:.0f} MB of memory for the examples and {model / 1e6:.2f} MB for each model kept",
        *(f"note       {note}" for note in plan.notes),
    ]
