"""``hybridfl split``: who owns what under a config, as a table and as figures, without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hybridfl.config import Composed
from hybridfl.data.dataset import Dataset
from hybridfl.data.split import Drawn, Split
from hybridfl.errors import ConfigError
from hybridfl.ownership import ROWS, labels_of, ownership
from hybridfl.plan import draw, settings_of

HEAT_MAP, HISTOGRAM, SPLIT, DOMAINS = "classes.png", "sizes.png", "split.json", "domains.png"


def show(composed: Composed, out: Path | None = None, every: bool = False) -> str:
    """The split that a run with this config has, in words and as a table.

    The model and the method are not asked, so a split can be looked at that they would refuse.

    Args:
        composed: the config.
        out: a folder for the figures and ``split.json``, made if need be; older files of these names are replaced.
        every: show all clients, not only the first.

    Raises:
        ConfigError, DataError: as for a run; or ``out`` cannot be written to.
    """
    settings, _ = settings_of(composed)
    drawn = draw(composed, settings)
    dataset = drawn.dataset
    roles = settings.clients.roles(settings.seed)
    lines = [*_facts(drawn), "", ownership(drawn, roles, None if every else ROWS)]
    if out is not None:
        partitioning = composed.config["partitioning"]
        plain = {k: v for k, v in partitioning.items() if k != "_target_" and v is not None and not isinstance(v, dict)}
        options = " ".join(f"{key}={value}" for key, value in plain.items())
        name = f"{type(settings.partitioning).__name__} {options}".strip()
        lines += ["", *(f"wrote {path}" for path in _write(out, dataset, drawn.split, f"{dataset.name}, {name}"))]
    return "\n".join(lines)


def _facts(drawn: Drawn) -> list[str]:
    dataset, split = drawn.dataset, drawn.split
    sizes, held = split.class_counts.sum(1), np.count_nonzero(split.class_counts, axis=1)
    server = len(split.server_train) + len(split.server_val)
    beyond = len(drawn.pool) - len(dataset.train)
    nobodys = len(drawn.pool) - server - int(sizes.sum())
    only = [f"{beyond} that only it has"] if beyond else []
    only += [labels] if server and (labels := labels_of(drawn)) != "labelled" else []
    left = (f" ({', '.join(only)})" if only else "", f", {nobodys} to nobody" if nobodys else "")
    domains = f" from {len(dataset.domains)} domains ({', '.join(dataset.domains)})" if len(dataset.domains) > 1 else ""
    return [
        f"data       {dataset.name}, {len(dataset.train)} training and {len(dataset.test)} test examples of "
        f"{dataset.classes} classes{domains}",
        f"split      {split.digest}, {split.moved} examples moved to clients below the minimum",
        f"examples   {server} to the server{left[0]}, {sizes.sum()} to {len(sizes)} clients{left[1]}",
        f"a client   has {sizes.min()} to {sizes.max()} examples (median {np.median(sizes):g}) "
        f"of {held.min()} to {held.max()} classes (median {np.median(held):g})",
    ]


def _write(out: Path, dataset: Dataset, split: Split, title: str) -> list[Path]:
    from hybridfl.figures import heat_map, histogram

    paths = [out / HEAT_MAP, out / HISTOGRAM, out / SPLIT]
    title = f"{title}\n{len(split.class_counts)} clients, split {split.digest}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        heat_map(split.class_counts, title, paths[0])
        histogram(split.class_counts.sum(1), title, paths[1])
        paths[2].write_text(json.dumps(split.to_json()), encoding="utf-8")
        if len(dataset.domains) > 1:
            paths.append(out / DOMAINS)
            heat_map(split.domain_counts, title, paths[-1], dataset.domains)
    except OSError as error:
        problem = f"cannot write to '{out}' ({error.strerror or error}); name a folder that can be written to."
        raise ConfigError("--out", problem) from error
    return paths
