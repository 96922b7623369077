"""The model of a participant as a file that needs no hybridfl, and what one must know to run it beside it.

FILE.safetensors holds the names of the net's own ``state_dict``; an ensemble has ``0/``, ``1/``, … before the names of its
members. FILE.yaml, and as JSON the entry ``hybridfl`` in the metadata of FILE.safetensors, holds:

run, method, round: where the model comes from; ``round`` counts the rounds that were done.
participant: ``server`` or the number of a client. width: what was asked for; it is left out otherwise.
dataset, subset: the data; the chosen classes, if not all.
mean, std: one number for each channel; the net is fed ``(x - mean) / std``.
input_shape, classes: the shape of an example, and the number of logits.
seen: the classes that can be predicted, if a stream of tasks has not shown all of them yet.
dtype, batch_norm: of the tensors; the policy, see ``hybridfl/models/options.py``.
model: ``_target_`` and the options of the net, as it was built for the first member.
members: prefix of its names, weight (they sum to 1) and width, which stands for the net's own option.
left_out: names of tensors of the net that the file does not hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hybridfl.deployment import Deployment
from hybridfl.errors import ConfigError, nearest
from hybridfl.federation import Federation
from hybridfl.merging.saved import check_writable, write
from hybridfl.models.options import separated
from hybridfl.params import Params
from hybridfl.plan import Plan
from hybridfl.snapshot import Snapshot
from hybridfl.store import write_text_atomic
from hybridfl.types import SERVER, Served

SUFFIX = ".safetensors"
MARK = "# A model and how to run it, see hybridfl export --help\n"


class Exported(NamedTuple):
    """Tensors by name, and what the YAML says of them."""

    tensors: Params
    about: dict[str, Any]

    def without(self, prefix: str) -> Exported:
        """The same but for the tensors whose names begin so."""
        left_out = [name for name in self.tensors if name.startswith(prefix)]
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in left_out}
        return Exported(kept, self.about | ({"left_out": left_out} if left_out else {}))


def exported(plan: Plan, snapshot: Snapshot, participant: int = SERVER, width: float | None = None) -> Exported:
    """What the participant would deploy after the rounds of the snapshot.

    Args:
        width: one of the method's ``widths``; ``None`` is what the participant would use.

    Raises:
        ConfigError: under ``--participant`` or ``--width``: there is no such model.
    """
    ensemble = _served(plan, snapshot, participant, width)
    total = sum(served.weight for served in ensemble)
    federation, node = plan.federation, separated(plan.composed.config["model"])[1]
    tensors: Params = {}
    members: list[dict[str, Any]] = []
    for number, served in enumerate(ensemble):
        prefix = f"{number}/" if len(ensemble) > 1 else ""
        tensors |= {f"{prefix}{name}": tensor for name, tensor in _state_dict(federation, served).items()}
        scaled = {"width": float(node["width"] * served.width)} if "width" in node else {}
        members.append({"prefix": prefix, "weight": served.weight / total, **scaled})
    subset, seen = plan.settings.classes, federation.tasks.labels("seen", snapshot.round - 1)
    about = {
        "run": plan.digest,
        "method": plan.composed.method_name,
        "round": snapshot.round,
        "participant": "server" if participant == SERVER else participant,
        **({} if width is None else {"width": width}),
        "dataset": federation.dataset.name,
        **({} if subset is None else {"subset": subset if isinstance(subset, str) else list(subset)}),
        "input_shape": list(federation.dataset.train.x.shape[1:]),
        "classes": federation.classes,
        **({} if seen is None or len(seen) == federation.classes else {"seen": list(seen)}),
        "mean": list(map(float, federation.scale.mean)),
        "std": list(map(float, federation.scale.std)),
        "dtype": plan.settings.dtype,
        "batch_norm": federation.model_options.batch_norm,
        "model": node | {key: members[0][key] for key in ("width",) if key in node},
        "members": members,
    }
    return Exported(tensors, about)


def described(path: Path) -> Path:
    """Where the YAML of a file lies.

    Raises:
        ConfigError: under ``--out``: the file has another suffix or cannot be written there, or a YAML there is no earlier one of a model.
    """
    if path.suffix != SUFFIX:
        raise ConfigError("--out", f"got '{path}': nearest valid value: {path.with_suffix(SUFFIX)}.")
    check_writable(path)
    beside = path.with_suffix(".yaml")
    if beside.exists() and not (beside.is_file() and beside.read_bytes().startswith(MARK.encode())):
        problem = f"got '{path}', and '{beside}', which would tell about it, is something else; name another file."
        raise ConfigError("--out", problem)
    return beside


def write_exported(path: Path, export: Exported) -> str:
    """Both files, each whole or not at all; what was written, in words.

    Raises:
        ConfigError: as :func:`described`.
        StoreError: they cannot be written.
    """
    import yaml

    beside = described(path)
    # One entry: the format keeps several in no order, and the same model should be the same bytes.
    write(path, export.tensors, {"hybridfl": json.dumps(export.about)})
    write_text_atomic(beside, MARK + yaml.safe_dump(export.about, sort_keys=False, allow_unicode=True))
    numbers = sum(tensor.numel() for tensor in export.tensors.values())
    return f"wrote {path} and {beside}: {len(export.tensors)} tensors of {numbers} numbers"


def _served(plan: Plan, snapshot: Snapshot, participant: int, width: float | None) -> list[Served]:
    method, number = plan.method, plan.federation.clients.number
    asked: tuple[float, ...] = ()
    if width is not None:
        if not method.widths:
            raise ConfigError(
                "--width", f"got {width:g}: {plan.composed.method_name} serves one width only; leave it out."
            )
        closest = min(method.widths, key=lambda valid: abs(valid - width))
        if closest != width:
            problem = (
                f"got {width:g}: nearest valid value: {closest:g}. Valid: {', '.join(f'{w:g}' for w in method.widths)}."
            )
            raise ConfigError("--width", problem)
        asked = (width,)
    if not SERVER <= participant < number:
        raise ConfigError(
            "--participant",
            f"got {participant}: the clients are 0 to {number - 1}; nearest valid value: {_closest(participant, number)}.",
        )
    deployment = Deployment(plan.federation, snapshot.kept, snapshot.round)
    ensemble = deployment.ready(method.serve(snapshot.state, participant, *asked), participant)
    if ensemble:
        return ensemble
    have = [client for client in range(number) if method.serve(snapshot.state, client, *asked)]
    if participant == SERVER:
        problem = f"is needed: this run has no global model, but one for each client. {_clients(have, number)}"
    else:
        problem = f"got {participant}, a client without a model. {_clients(have, number)}"
    raise ConfigError("--participant", problem.rstrip())


def _closest(participant: int, number: int) -> int:
    return min(max(participant, 0), number - 1)


def _clients(have: list[int], number: int) -> str:
    return f"Valid: 0 to {number - 1}." if len(have) == number else nearest("", map(str, have))


def _state_dict(federation: Federation, served: Served) -> dict[str, Tensor]:
    """The tensors as the net calls them, each with memory of its own, on the CPU."""
    found: Mapping[str, Tensor] = {**served.model.params, **served.model.buffers}
    # What a model leaves out is run with the net's own.
    own = federation.net_at(served.width).state_dict()
    return {name: found.get(name, tensor).detach().cpu().clone() for name, tensor in own.items()}
