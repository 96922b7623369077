"""Weights from files: the model of round 0 (``start=FILE``), and what ``hybridfl merge`` reads.

Files from elsewhere call the same tensors otherwise. A net may say so in a class attribute ``key_map``, part of a dotted
name → what stands for it in the net: with ``{"module": "", "bn1": "norm1", "layer1": "stages.0"}`` the file's
``module.layer1.0.bn1.weight`` is the net's ``stages.0.0.norm1.weight``. Only whole parts are replaced, each once, and ""
leaves a part out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridfl.errors import ConfigError, nearest
from hybridfl.types import Model

HEAD = "head."
COUNTER = ".num_batches_tracked"
STATISTICS = (".running_mean", ".running_var", COUNTER)


class Weights(NamedTuple):
    """A model read from a file, and what the user should know about it."""

    model: Model
    notes: tuple[str, ...]


def read_weights(
    path: Path, like: Model, key_map: Mapping[str, str] | None = None, unused: Collection[str] = ()
) -> Weights:
    """Weights of a ``.safetensors`` file or of a ``torch.save``d state dict, in the shape and type of ``like``.

    A file without a classifier, or with one for another number of classes or of other layers, is read without it: the
    ``head`` is that of ``like``, and a note says so. BatchNorm's counters, which files of old versions of torch lack, are too.

    Args:
        like: the net's own model.
        key_map: for the names in the file; used unless fewer names fit with it than without.
        unused: names of tensors that the run never reads, so that the file may lack them.

    Raises:
        ConfigError: under the key ``start``: no such file, not weights, or names, shapes and types that do not fit the
            net, or numbers that are not finite.
    """
    if not path.is_file():
        given = "" if path == Path() else path
        hint = nearest(str(given), ("random", "server", "solo"))
        raise ConfigError(
            "start", f"got '{given}'. {hint} Or a file of weights (.safetensors, .pt, .th); there is none of that name."
        )
    wanted = {**like.params, **like.buffers}
    tensors = _renamed(read_tensors(path), wanted, key_map or {})
    note = _without_head(tensors, wanted)
    kept = {name for name in wanted if name.endswith(COUNTER) or name in unused}
    if note:
        kept |= {name for name in wanted if name.startswith(HEAD)}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
    tensors = {name: wanted[name] for name in kept} | tensors
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        problem = f"{path} does not fit the net: missing {_some(missing)}; not in the net {_some(extra)}."
        raise ConfigError("start", f"{problem}{_hint(missing, extra)}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)} in the file, {tuple(tensor.shape)} in the net"
            raise ConfigError("start", f"{path}: '{name}' is {shapes}.")
        if tensor.is_floating_point() and not tensors[name].is_floating_point():
            raise ConfigError("start", f"{path}: '{name}' holds {_kind(tensors[name])}, the net's {_kind(tensor)}.")
        if not tensors[name].isfinite().all():
            raise ConfigError("start", f"{path}: '{name}' holds numbers that are not finite; give weights that are.")
    fitted = {name: tensors[name].to(like_tensor) for name, like_tensor in wanted.items()}
    model = Model({n: fitted[n] for n in like.params}, {n: fitted[n] for n in like.buffers})
    return Weights(model, (f"{path} {note}",) if note else ())


def _renamed(tensors: dict[str, Tensor], wanted: Collection[str], key_map: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under the names that the map gives them, unless the file's own fit better or two would become one."""
    renamed = {_in_the_net(name, key_map): tensor for name, tensor in tensors.items()}
    if len(renamed) == len(tensors) and len(renamed.keys() & wanted) >= len(tensors.keys() & wanted):
        return renamed
    return tensors


def _in_the_net(name: str, key_map: Mapping[str, str]) -> str:
    return ".".join(filter(None, (key_map.get(part, part) for part in name.split("."))))


def _without_head(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """Why the net keeps its own head, if it must: that of the file differs in more than its values, and not in part."""
    own = {name: tensor.shape for name, tensor in wanted.items() if name.startswith(HEAD)}
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(HEAD)}
    if own and not own.keys() & found.keys():
        return f"has {'a classifier of other layers' if found else 'no classifier'}: the head keeps its first weights"
    if own.keys() != found.keys() or own == found or not all(found.values()):
        return None
    classes = {shape[0] for shape in found.values()}
    if len(classes) > 1 or any(found[name][1:] != shape[1:] for name, shape in own.items()):
        return None
    return f"has a classifier of {classes.pop()} classes: the head keeps its first weights"


def _hint(missing: list[str], extra: list[str]) -> str:
    """What the user may have meant, a sentence."""
    if missing and extra:
        return f" For '{missing[0]}': {nearest(missing[0], extra, extra[:5])}"
    if extra and all(name.endswith(STATISTICS) for name in extra):
        return " The file is of a net with BatchNorm: try model.norm=batch, if the model has that option."
    return ""


def read_tensors(path: Path, key: str = "start") -> dict[str, Tensor]:
    """What a ``.safetensors`` file or a ``torch.save``d state dict holds, on the CPU.

    Raises:
        ConfigError: under ``key``: it cannot be read as weights.
    """
    from safetensors.torch import load_file

    loaded: Any
    try:
        if path.suffix == ".safetensors":
            loaded = dict(load_file(path))
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes a reader raise
        problem = f"cannot read '{path}' as weights ({type(error).__name__})"
        raise ConfigError(key, f"{problem}; expected safetensors, or a state dict saved by torch.save.") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ConfigError(key, f"'{path}' holds no name → tensor dict.")
    return loaded


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
