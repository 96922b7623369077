"""Who owns what, from ``split.json``: one picture for each distinct split, and the roles of clients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hybridfl.keys import label, token
from hybridfl.report.rows import Shown
from hybridfl.runs import Run

CELLS = 200_000
"""In all heat maps together; further splits are left out."""
CLIENTS = 200
"""Of a split, at most: the first by number."""


class Splits:
    """``split.json`` of runs. Of runs with the same split and the same clients one is read."""

    def __init__(self) -> None:
        self._read: dict[tuple[Any, ...], dict[str, Any]] = {}

    def of(self, run: Run) -> dict[str, Any]:
        """What there is to see of a run's split; empty if the file is missing or damaged."""
        behaviour = tuple((key, token(value)) for key, value in run.flat.items() if key.startswith("clients."))
        key = (run.status.get("split") or str(run.folder), token(run.value("seed")), behaviour)
        if key not in self._read:
            try:
                stored = json.loads((run.folder / "split.json").read_bytes())
                self._read[key] = _shown(stored)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self._read[key] = {}
        return self._read[key]

    def roles(self, run: Run) -> Mapping[str, str]:
        """Client → role, of those that have one."""
        roles: Mapping[str, str] = self.of(run).get("roles", {})
        return roles


def _shown(stored: Mapping[str, Any]) -> dict[str, Any]:
    clients, server = stored["clients"][:CLIENTS], stored["server"]
    domains = [str(name) for name in stored.get("domains") or []]
    return {
        "digest": str(stored["digest"]),
        "data": None if stored.get("data") is None else str(stored["data"]),
        "roles": {str(client): str(role) for client, role in (stored.get("roles") or {}).items()},
        "number": len(stored["clients"]),
        "clients": [client["class_counts"] for client in clients],
        "server": stored.get("server_class_counts"),
        "server_size": server["sizes"]["train"] + server["sizes"]["val"],
        "domains": domains if len(domains) > 1 else [],
        "client_domains": [client["domain_counts"] for client in clients] if len(domains) > 1 else [],
        "server_domains": stored.get("server_domain_counts"),
    }


def splits(of: Shown, read: Splits, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The distinct splits with their roles, and in which settings and with which seeds they are used."""
    found: dict[str, dict[str, Any]] = {}
    cells = left_out = 0
    for row, named in zip(of.rows, rows, strict=True):
        for run in row.all_runs:
            split = read.of(run)
            if not split:
                continue
            key = json.dumps([split["digest"], split["roles"]])
            if key not in found:
                size = sum(map(len, (*split["clients"], *split["client_domains"])))
                fits = cells + size <= CELLS
                cells, left_out = (cells + size, left_out) if fits else (cells, left_out + 1)
                found[key] = split | {"settings": {}, "seeds": {}, "runs": 0} if fits else {}
            if entry := found[key]:
                entry["settings"][named["setting"]] = entry["seeds"][label(run.value("seed"))] = None
                entry["runs"] += 1
    if left_out:
        of.warn(f"Heat maps of {left_out} of {len(found)} splits are left out, to keep the page small.")
    kept = [entry for entry in found.values() if entry]
    return [entry | {"settings": list(entry["settings"]), "seeds": list(entry["seeds"])} for entry in kept]
