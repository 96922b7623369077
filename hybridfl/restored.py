"""A run made again from its folder: the plan of its ``config.yaml``, and the state of its last checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hybridfl import checkpoints
from hybridfl.config import Composed
from hybridfl.devices import device_of
from hybridfl.errors import ConfigError, DataError, HybridflError
from hybridfl.experiment import unpacked
from hybridfl.plan import Plan, Settings, make_plan
from hybridfl.runs import FACTS, WAY_OUT, Run, to_stderr
from hybridfl.snapshot import Snapshot


def composed_of(run: Run) -> Composed:
    """The config a run was made with; nothing is composed, as the stored one names every key.

    Raises:
        ConfigError: under the run's name: its folder holds no config of a run.
    """
    config = dict(run.config)
    method, line, digest = (config.pop(key, None) for key in ("method", "overrides", "digest"))
    if not isinstance(method, dict) or digest is None:
        raise ConfigError(run.folder.name, "has no config.yaml of a run, so it cannot be made again.")
    node = {key: value for key, value in method.items() if key not in FACTS}
    name = str(method.get("name", "method"))
    return Composed(config | {"merging": node}, "merging", name, (str(line),) if line else ())


def plan_of(run: Run, data_root: str | None = None) -> Plan:
    """The plan that the run was made from.

    Its data are looked for in ``data_root``, or without one where the run found them and then where a new run would
    look. The device is the run's if this machine has it.

    Raises:
        ConfigError: under the run's name: its config cannot be planned here, such as for want of a file it starts from.
        DataError: the data are missing, or they, or code of the user's, are not those of the run.
    """
    composed = composed_of(run)
    composed.config.pop("tracker", None)  # nothing is sent, and its package may be missing here
    device = _device(composed.config)
    default = os.environ.get("HYBRIDFL_DATA", Settings.data_root)
    roots = [data_root] if data_root else dict.fromkeys([str(composed.config.get("data_root", default)), default])
    problem: DataError | None = None
    for root in roots:
        here = replace(composed, config=composed.config | {"data_root": root, "device": device})
        try:
            return _same(run, make_plan(here))
        except DataError as error:
            problem = error
        except ConfigError as error:
            raise ConfigError(run.folder.name, f"cannot be made again from its config.yaml: {error}") from error
    assert problem is not None
    raise problem


def snapshot_of(run: Run, plan: Plan, on_note: Callable[[str], None] = to_stderr) -> Snapshot:
    """What the run remembered after its last round, or when the last checkpoint was written if it has not ended.

    Raises:
        HybridflError: there is no checkpoint.
        DataError: there are some, and none can be read.
    """
    skipped: list[str] = []
    loaded = checkpoints.load_latest(run.folder / "checkpoints", plan.federation.device, skipped.append)
    if loaded is None and skipped:
        problem = " ".join(skipped)
        raise DataError(f"{run.folder.name}: has no checkpoint left to read. {problem} To get one: {WAY_OUT}.")
    for note in skipped:
        on_note(note)
    if loaded is None:
        raise HybridflError(
            f"{run.folder.name}: has no checkpoint, so there is no model yet; train makes one after checkpoint_seconds, "
            "when it is stopped and at its end."
        )
    return unpacked(loaded[1])


def _device(config: dict[str, Any]) -> str:
    name = str(config.get("device", "auto"))
    try:
        device_of(name)
    except ConfigError:
        return "auto"
    return name


def _same(run: Run, plan: Plan) -> Plan:
    digest = run.config["digest"]
    if plan.digest == digest:
        return plan
    found, stored = plan.federation.dataset.fingerprint, _fingerprint(run)
    if stored is not None and stored != found:
        problem = f"its data have changed: {plan.federation.dataset.name} has the fingerprint {found} in "
        problem += f"'{plan.settings.data_root}', and had {stored}. --data-root names another folder"
    else:
        problem = f"its config.yaml now gives the run {plan.digest}: a file that it names (start, partitioning.path), "
        problem += "code of yours, or config.yaml itself has changed, or another version of hybridfl wrote it"
    raise DataError(f"{run.folder.name}: is the run {digest}, but {problem}.")


def _fingerprint(run: Run) -> str | None:
    """Of the data, as the run saw them."""
    try:
        found = json.loads((run.folder / "split.json").read_bytes()).get("data")
    except (OSError, ValueError, AttributeError):
        return None
    return str(found) if found is not None else None
