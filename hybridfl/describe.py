"""``hybridfl train --dry-run``: what would be run, who owns what, and what it would cost, without running it."""

from __future__ import annotations

import io

from hybridfl.params import nbytes
from hybridfl.plan import Plan
from hybridfl.types import SERVER

ROWS = 20
"""Clients shown before the table is cut."""


def describe(plan: Plan) -> str:
    """Checks passed, the split as a table, estimated bytes and memory."""
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO(), highlight=False)
    for line in (*_facts(plan), ""):
        console.print(line, markup=False)
    console.print(_table(plan))
    return console.export_text().rstrip()


def _facts(plan: Plan) -> list[str]:
    federation, settings = plan.federation, plan.settings
    model = nbytes([*federation.start.params.values(), *federation.start.buffers.values()])
    traffic = settings.rounds * federation.clients.cohort * model
    item = federation.start.params[next(iter(federation.start.params))].element_size()
    data = (federation.dataset.train.x.size + federation.dataset.test.x.size) * item
    parameters = sum(tensor.numel() for tensor in federation.start.params.values())
    return [
        f"run        {plan.digest} ({plan.composed.method_name}), checked: it can start",
        f"data       {federation.dataset.name}, {len(federation.dataset.train)} training and "
        f"{len(federation.dataset.test)} test examples, fingerprint {federation.dataset.fingerprint}",
        f"split      {federation.split.digest}, {federation.split.moved} examples moved to clients below the minimum",
        f"model      {parameters:,} parameters, {federation.forward_macs:,} MACs a forward pass",
        f"rounds     {settings.rounds} of {federation.clients.cohort} client updates, on {federation.device}",
        f"estimate   {traffic / 1e6:.1f} MB down and {traffic / 1e6:.1f} MB up if every update is one model; "
        f"{data / 1e6:.0f} MB of memory for the examples and {model / 1e6:.2f} MB for each model kept",
    ]


def _table(plan: Plan) -> object:
    from rich.table import Table

    federation = plan.federation
    labels = federation.dataset.train.y
    table = Table(title="Training examples by owner and class", title_justify="left")
    table.add_column("owner")
    for name in ("train", "val", "test", *map(str, range(federation.classes))):
        table.add_column(name, justify="right")
    shown = federation.participants[-1:] if SERVER in federation.participants else []
    shown += list(range(min(ROWS, federation.clients.number)))
    for owner in shown:
        train, val = federation.owned(owner, "train"), federation.owned(owner, "val")
        test = len(federation.dataset.test) if owner == SERVER else len(federation.split.clients_test[owner])
        counts = [int((labels[train] == c).sum() + (labels[val] == c).sum()) for c in range(federation.classes)]
        name = "server" if owner == SERVER else f"{owner} (noisy)" if owner in federation.noisy_clients else str(owner)
        table.add_row(name, *(str(n) if n else "·" for n in (len(train), len(val), test, *counts)))
    hidden = federation.clients.number - ROWS
    if hidden > 0:
        table.caption = f"and {hidden} more clients"
    return table
