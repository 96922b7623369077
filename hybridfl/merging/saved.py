"""Models saved as plain name → tensor files: several that fit each other are read, merged without any net, written."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.errors import ConfigError, nearest
from hybridfl.models.files import read_tensors
from hybridfl.params import Params
from hybridfl.store import readable_errors, write_bytes_atomic

SUFFIXES = (".safetensors", ".pt", ".pth")
STATISTICS = ("running_mean", "running_var")
"""Last parts of the names of what normalisation layers measure; it is no weight, and has no business below 0."""
SHOWN = 5


def read(paths: Sequence[Path]) -> list[Params]:
    """The models of these files, their tensors by name: a merge must not depend on the order in which a format keeps them.

    Raises:
        ConfigError: under the path: there is no such file, it cannot be read as weights, or it does not fit the first.
    """
    for path in paths:
        if not path.is_file():
            beside = [p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES] if path.parent.is_dir() else []
            hint = nearest(path.name, beside) or "Give a state dict in safetensors, or saved by torch.save."
            raise ConfigError(str(path), f"there is no such file. {hint}")
    models = [dict(sorted(P.detach(read_tensors(path, str(path))).items())) for path in paths]
    for path, model in zip(paths, models, strict=True):
        check_fit(model, models[0], str(path), str(paths[0]))
    return models


def check_fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str, other: str) -> None:
    """Refuse tensors whose names and shapes are not those of ``wanted``.

    Raises:
        ConfigError: under ``name``; it tells the first tensors that differ from those of ``other``.
    """
    missing = [n for n in wanted if n not in tensors]
    extra = [n for n in tensors if n not in wanted]
    shapes = [
        f"{n} {tuple(tensors[n].shape)} instead of {tuple(t.shape)}"
        for n, t in wanted.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    parts = [("it lacks", missing), ("only it has", extra), ("of other shapes are", shapes)]
    found = [f"{what} {_first(names)}" for what, names in parts if names]
    if found:
        raise ConfigError(name, f"does not fit {other}: {'; '.join(found)}.")


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def merge(
    operator: Callable[[list[Params], Params | None], Params],
    models: Sequence[Params],
    base: Params | None = None,
    weights: Sequence[float] | None = None,
) -> Params:
    """What ``operator(models, base)`` makes of the models, computed in float64, in the types of the first.

    The operator sees floating-point tensors only; integers (counters) take the largest value. With a base it does not
    see running statistics either, which are no weights that a difference can be added to: they take the weighted mean,
    the plain one if a weight is negative.
    """
    merged = [n for n, t in models[0].items() if t.is_floating_point() and not (base and _is_statistic(n))]
    kept = [name for name in models[0] if name not in set(merged)]

    def part(model: Params, names: Sequence[str]) -> Params:
        return widened({n: model[n] for n in names})

    result = operator([part(model, merged) for model in models], None if base is None else part(base, merged))
    shares = weights if weights and min(weights) >= 0 and sum(weights) > 0 else None
    result = result | P.mean([part(model, kept) for model in models], shares)
    return {name: result[name].to(tensor.dtype) for name, tensor in models[0].items()}


def widened(tensors: Mapping[str, Tensor]) -> Params:
    """Floating-point tensors in float64, the others as they are."""
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in STATISTICS


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written once the work is done.

    Raises:
        ConfigError: under ``--out``: it is a folder, or what it lies in is a file.
    """
    if path.is_dir():
        raise ConfigError("--out", f"got '{path}', which is a folder; name a file.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError("--out", f"got '{path}', and '{above.name}' in it is no folder; name another file.")


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A ``.safetensors`` file, or with another suffix a state dict by ``torch.save``; the folder is made if need be.

    Args:
        metadata: of a ``.safetensors`` file; the other format has no place for it.

    Raises:
        StoreError: it cannot be written; an older file of that name is then untouched.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        data = save(contiguous, dict(metadata) if metadata else None)
    else:
        buffer = io.BytesIO()
        torch.save(contiguous, buffer)
        data = buffer.getvalue()
    with readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, data)
