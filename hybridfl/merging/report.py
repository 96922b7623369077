"""How good saved models and their merge are on a config's test part, and the loss barriers between them, as tables."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table

from hybridfl.config import Composer
from hybridfl.federation import Federation
from hybridfl.local import predict
from hybridfl.merging.barrier import POINTS, barrier
from hybridfl.merging.rebasin import fitted
from hybridfl.merging.saved import widened
from hybridfl.params import Params
from hybridfl.plan import make_plan


def federation_of(overrides: Sequence[str], config_dir: Path | None = None) -> Federation:
    """Of the config with these overrides; its method is FedAvg unless another is chosen, as that asks nothing of it.

    Raises:
        ConfigError: the config is wrong.
        DataError: a data file is missing or broken.
    """
    with Composer(config_dir) as composer:
        return make_plan(composer.compose(["baseline=fedavg", *overrides])).federation


def report(
    federation: Federation,
    inputs: Mapping[str, Params],
    name: str,
    merged: Params,
    aligned: Sequence[Params] = (),
) -> str:
    """Accuracy and loss of the inputs and of what they were merged to, then the barrier between every two inputs.

    Args:
        federation: whose data set, net, dtype and device are used.
        aligned: the inputs with their hidden units in one order; the barriers between them are told too.
    """
    scores = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("model", "accuracy %", "loss"):
        scores.add_column(title, justify="left" if title == "model" else "right")
    for called, tensors in [*inputs.items(), (name, merged)]:
        accuracy, loss = _score(federation, tensors)
        scores.add_row(called, f"{100 * accuracy:.2f}", f"{loss:.6g}")
    barriers = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("from", "to", "loss barrier", "at", *(["once aligned", "at"] if aligned else [])):
        barriers.add_column(title, justify="left" if title in ("from", "to") else "right")
    sides = [list(inputs.values()), *([aligned] if aligned else [])]
    for (i, one), (j, other) in itertools.combinations(enumerate(inputs), 2):
        found = [
            barrier(lambda tensors: _score(federation, tensors)[1], widened(side[i]), widened(side[j]))
            for side in sides
        ]
        barriers.add_row(one, other, *(number for f in found for number in (f"{f.height:.6g}", f"{f.at:g}")))
    tables = [scores, barriers] if len(inputs) > 1 else [scores]
    told = f"On the {len(federation.test[1])} test examples of {federation.dataset.name}."
    path = f"Barrier: the most by which the loss at {POINTS} points of the straight line exceeds the line between its ends."
    return "\n\n".join([*map(_lines, tables), "\n".join([told, path] if len(inputs) > 1 else [told])])


def _score(federation: Federation, tensors: Params) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on the test part."""
    x, y = federation.test
    logits = predict(federation.net, fitted(federation.net, tensors), x, federation.chunk).double()
    return float((logits.argmax(1) == y).double().mean()), float(F.cross_entropy(logits, y))


def _lines(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=10_000).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())
