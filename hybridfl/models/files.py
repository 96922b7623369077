"""Weights from files: the model of round 0 (``start=FILE``)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hybridfl.errors import ConfigError, nearest
from hybridfl.types import Model


def read_weights(path: Path, like: Model) -> Model:
    """Weights of a ``.safetensors`` file or of a ``torch.save``d state dict, in the shape and type of ``like``.

    Raises:
        ConfigError: under the key ``start``: no such file, not weights, or names and shapes that do not fit the net.
    """
    if not path.is_file():
        hint = nearest(str(path), ("random", "server"))
        raise ConfigError(
            "start", f"got '{path}'. {hint} Or a file of weights (.safetensors, .pt); there is none of that name."
        )
    tensors = _read(path)
    wanted = {**like.params, **like.buffers}
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        problem = f"{path} does not fit the net: missing {_some(missing)}; not in the net {_some(extra)}."
        raise ConfigError("start", problem)
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)} in the file, {tuple(tensor.shape)} in the net"
            raise ConfigError("start", f"{path}: '{name}' is {shapes}.")
    fitted = {name: tensors[name].to(like_tensor) for name, like_tensor in wanted.items()}
    return Model({n: fitted[n] for n in like.params}, {n: fitted[n] for n in like.buffers})


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes a reader raise
        problem = f"cannot read '{path}' as weights ({type(error).__name__})"
        raise ConfigError("start", f"{problem}; expected safetensors, or a state dict saved by torch.save.") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ConfigError("start", f"'{path}' holds no name → tensor dict.")
    return loaded


def _some(names: list[str]) -> str:
    return "nothing" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
