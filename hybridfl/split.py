"""``hybridfl split``: who owns what under a config, as a table and as figures, without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hybridfl.config import Composed
from hybridfl.data.dataset import Dataset
from hybridfl.data.split import Split
from hybridfl.errors import ConfigError
from hybridfl.ownership import ROWS, ownership
from hybridfl.plan import draw, settings_of

HEAT_MAP, HISTOGRAM, SPLIT = "classes.png", "sizes.png", "split.json"


def show(composed: Composed, out: Path | None = None, every: bool = False) -> str:
    """The split that a run with this config has, in words and as a table.

    The model and the method are not asked, so a split can be looked at that they would refuse.

    Args:
        composed: the config.
        out: a folder for the two figures and ``split.json``, made if need be; older files of these names are replaced.
        every: show all clients, not only the first.

    Raises:
        ConfigError, DataError: as for a run; or ``out`` cannot be written to.
    """
    settings, _ = settings_of(composed)
    dataset, split = draw(composed, settings)
    noisy = settings.clients.noisy(settings.seed)
    lines = [*_facts(dataset, split), "", ownership(dataset, split, noisy, None if every else ROWS)]
    if out is not None:
        partitioning = {k: v for k, v in composed.config["partitioning"].items() if k != "_target_" and v is not None}
        options = " ".join(f"{key}={value}" for key, value in partitioning.items())
        name = f"{type(settings.partitioning).__name__} {options}".strip()
        lines += ["", *(f"wrote {path}" for path in _write(out, dataset, split, f"{dataset.name}, {name}"))]
    return "\n".join(lines)


def _facts(dataset: Dataset, split: Split) -> list[str]:
    sizes, held = split.class_counts.sum(1), np.count_nonzero(split.class_counts, axis=1)
    server = len(split.server_train) + len(split.server_val)
    nobodys = len(dataset.train) - server - int(sizes.sum())
    left = f", {nobodys} to nobody" if nobodys else ""
    return [
        f"data       {dataset.name}, {len(dataset.train)} training and {len(dataset.test)} test examples of "
        f"{dataset.classes} classes",
        f"split      {split.digest}, {split.moved} examples moved to clients below the minimum",
        f"examples   {server} to the server, {sizes.sum()} to {len(sizes)} clients{left}",
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
    except OSError as error:
        problem = f"cannot write to '{out}' ({error.strerror or error}); name a folder that can be written to."
        raise ConfigError("--out", problem) from error
    return paths
