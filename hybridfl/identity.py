"""A run's identity: what decides its numbers, and nothing else. Its digest is the run's name."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridfl.build import locate
from hybridfl.config import NOT_IDENTITY, Composed
from hybridfl.data.dataset import Dataset

RESULTS_VERSION = 3
"""Raised when the same config gives other numbers than before."""


def identity_of(
    composed: Composed, dataset: Dataset, sources: Sequence[str], files: Mapping[str, Path]
) -> dict[str, Any]:
    """What decides the run's numbers; of options that name ``files``, by their keys, the files' contents.

    Args:
        sources: fingerprints of other data sets that are read.
    """
    config = {k: v for k, v in composed.config.items() if k not in NOT_IDENTITY}
    for key, path in files.items():
        config = _replaced(config, key.split("."), _file_digest(path))
    method = composed.config[composed.method_key]
    return {
        "results_version": RESULTS_VERSION,
        "config": _canonical(config),
        "method": method,
        "data": dataset.fingerprint,
        **({"server_data": sources} if sources else {}),
        "sources": {target: _source_digest(target) for target in sorted({*_outside_targets([config, method])})},
    }


def digest_of(composed: Composed, dataset: Dataset, sources: Sequence[str], files: Mapping[str, Path]) -> str:
    text = json.dumps(identity_of(composed, dataset, sources, files), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _replaced(node: Mapping[str, Any], key: list[str], value: str) -> dict[str, Any]:
    name, *further = key
    return {**node, name: _replaced(node[name], further, value) if further else value}


def _canonical(node: Any, key: str = "") -> Any:
    """The same config whichever way its numbers are written: 4 and 4.0 are one.

    But not 1 and 1.0 of the clients, which may be one client and all of them.
    """
    if isinstance(node, Mapping):
        return {name: _canonical(value, key or name) for name, value in node.items()}
    if isinstance(node, list):
        return [_canonical(value, key) for value in node]
    whole = isinstance(node, float) and node.is_integer()
    return int(node) if whole and not (key == "clients" and node == 1) else node


def _outside_targets(node: Any) -> Iterator[str]:
    """Dotted targets anywhere in the config that are not this package's."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if isinstance(target, str) and not target.startswith("hybridfl."):
            yield target
        for value in node.values():
            yield from _outside_targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _outside_targets(value)


def _source_digest(target: str) -> str:
    found = inspect.unwrap(locate(target, target))
    try:
        source = inspect.getsourcefile(found)
    except TypeError:  # built in: there is no source to change
        source = None
    return _file_digest(Path(source)) if source else "built in"


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
