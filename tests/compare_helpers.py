"""Fabricated output folders for the tests of ``hybridfl compare``, and its CSV read back."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybridfl.compare import Options, render

HEADER = ",".join(
    [
        *("round", "scope", "accuracy", "loss", "worst10", "spread", "examples"),
        *("bytes_up", "bytes_down", "bytes_peer", "macs", "server_macs", "local_steps", "seconds"),
    ]
)
Scopes = Mapping[str, Sequence[float]]


class Outputs:
    """An output folder with fabricated runs; every round moves 1 MB up, 2 MB down and nothing between peers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "runs").mkdir(parents=True)

    def run(self, name: str, method: str, seed: int, scopes: Scopes | Sequence[float], **changes: Any) -> Path:
        """One run; ``changes`` are dotted config keys with ``__`` for the dot, or ``status`` or ``split``."""
        folder = self.path / "runs" / name
        folder.mkdir()
        split, status = changes.pop("split", f"split{seed}"), changes.pop("status", "done")
        config: dict[str, Any] = {
            "seed": seed,
            "rounds": 5,
            "digest": name.partition("-")[0],
            "overrides": f"baseline={method} seed={seed}",
            "partitioning": {"alpha": 0.1, "seed": seed},
            "method": {"name": method, "_target_": f"hybridfl.methods.{method}.Method"},
        }
        for key, value in changes.items():
            *groups, last = key.split("__")
            node = config
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = value
        curves = scopes if isinstance(scopes, Mapping) else {"global": scopes}
        rows = [
            f"{index},{scope},{value},{1 - value},{value / 2 if scope == 'clients' else ''},,9,{index}e6,{2 * index}e6"
            ",,,,,"
            for scope, values in curves.items()
            for index, value in enumerate(values, 1)
        ]
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / "status.json").write_text(json.dumps({"status": status, "split": split, "round": 5, "rounds": 5}))
        (folder / "metrics.csv").write_text("\n".join([HEADER, *rows]) + "\n")
        return folder

    def sweep(self, *jobs: tuple[str, str]) -> Path:
        """A sweep with the given (run, status) lines."""
        folder = self.path / "sweeps" / "5eed"
        folder.mkdir(parents=True)
        lines = [f"{run},{status},m,o," for run, status in jobs]
        (folder / "runs.csv").write_text("\n".join(["run,status,method,overrides,error", *lines]) + "\n")
        return folder


def two_methods(outputs: Outputs) -> None:
    """feddle is better than fedavg by 0.1, 0.2 and 0.3 in the seeds 1, 2, 3."""
    for seed, (ours, theirs) in enumerate([(0.6, 0.5), (0.7, 0.5), (0.8, 0.5)], 1):
        outputs.run(f"a{seed}", "feddle", seed, [0.1, ours])
        outputs.run(f"b{seed}", "fedavg", seed, [0.2, theirs])


def table(path: Path, **options: Any) -> list[dict[str, str]]:
    """The CSV of a comparison, read back."""
    text = render([path], Options(format="csv", **{"at": "last", **options}), warn=lambda _: None)
    return list(csv.DictReader(io.StringIO(text)))


def by_method(path: Path, **options: Any) -> dict[str, dict[str, str]]:
    return {line["method"]: line for line in table(path, **options)}


def warnings_of(path: Path, **options: Any) -> list[str]:
    found: list[str] = []
    render([path], Options(**{"format": "csv", **options}), found.append)
    return found
