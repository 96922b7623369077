"""Arithmetic on flat name → tensor dicts.

A flat vector lays the tensors out in the dict's own order, each in row-major order; :class:`Layout` remembers where.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]


def detach(params: Mapping[str, Tensor]) -> Params:
    return {name: tensor.detach() for name, tensor in params.items()}


def clone(params: Mapping[str, Tensor]) -> Params:
    return {name: tensor.detach().clone() for name, tensor in params.items()}


def zeros(params: Mapping[str, Tensor]) -> Params:
    """Of the same names, shapes and kinds."""
    return {name: torch.zeros_like(tensor) for name, tensor in params.items()}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float = 1.0) -> Params:
    """``a + scale · b``, name by name."""
    return {name: torch.add(tensor, b[name], alpha=scale) for name, tensor in a.items()}


def subtract(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Params:
    return {name: tensor - b[name] for name, tensor in a.items()}


def mean(items: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> Params:
    """Weighted mean of dicts with the same names and shapes; weights are normalised to sum 1.

    Integer tensors (counters such as BatchNorm's ``num_batches_tracked``) take the largest value.

    Raises:
        ValueError: nothing to average, or weights that do not sum to a positive number.
    """
    if not items:
        raise ValueError("mean of no models")
    weights = [1.0] * len(items) if weights is None else list(weights)
    total = math.fsum(weights)
    if not total > 0:
        raise ValueError(f"weights sum to {total}, expected a positive number")
    out: Params = {}
    for name, first in items[0].items():
        tensors = [item[name] for item in items]
        if not first.is_floating_point():
            out[name] = torch.stack(tensors).amax(dim=0)
            continue
        if stack := _in_one_piece(tensors):
            rows, order = stack
            shares = torch.tensor([weights[i] / total for i in order], dtype=first.dtype, device=first.device)
            out[name] = (shares @ rows).view(first.shape)
            continue
        merged = torch.zeros_like(first)
        for weight, tensor in zip(weights, tensors, strict=True):
            merged.add_(tensor, alpha=weight / total)
        out[name] = merged
    return out


def _in_one_piece(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]] | None:
    """Tensors that lie one behind the other in one piece of memory, as lock-step leaves them: as rows, and whose each is."""
    first, size = tensors[0], tensors[0].nbytes
    if len(tensors) < 2 or size == 0 or not all(t.is_contiguous() and not t.requires_grad for t in tensors):
        return None
    places = [tensor.data_ptr() for tensor in tensors]
    order = sorted(range(len(places)), key=places.__getitem__)
    lowest = tensors[order[0]]
    if any(places[i] != places[order[0]] + k * size for k, i in enumerate(order)):
        return None
    begin = lowest.storage_offset()
    if lowest.untyped_storage().nbytes() < begin * first.element_size() + len(tensors) * size:
        return None
    return lowest.as_strided((len(tensors), first.numel()), (first.numel(), 1), begin), order


def norm(params: Mapping[str, Tensor]) -> Tensor:
    """Euclidean length over all tensors, a 0-d tensor."""
    return torch.stack([tensor.detach().square().sum() for tensor in params.values()]).sum().sqrt()


def greatest(tensor: Tensor) -> Tensor:
    """The largest absolute value, 0-d; NaN if there is one."""
    return torch.stack(tensor.aminmax()).abs().amax()


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, lists and tuples (a :class:`~hybridfl.types.Model` is one)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, Mapping)):  # dict first: to ask for the abstract class costs as much as all the rest
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def all_finite(value: Any) -> bool:
    """Whether no tensor in nested containers holds an infinity or NaN."""
    found = [tensor.detach() for tensor in tensors(value) if tensor.is_floating_point()]
    if not found:
        return True
    # One pass without a mask, and one answer from the device: a sum is finite unless an entry is not, or all are huge.
    sums = torch.stack([tensor.sum().double() for tensor in found])
    return bool(torch.isfinite(sums).all()) or all(bool(torch.isfinite(tensor).all()) for tensor in found)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of *distinct* tensors: what is named twice is sent once."""
    return sum({(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in tensors}.values())


def flatten(params: Mapping[str, Tensor]) -> Tensor:
    """One new vector of all tensors, shape ``(d,)``."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in params.values()])


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a dict lies in its flat vector."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Layout:
        return cls(tuple(params), tuple(tensor.shape for tensor in params.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(shape.numel() for shape in self.shapes)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Start and end of every tensor in the flat vector."""
        ends = list(itertools.accumulate(self.sizes))
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def unflatten(self, flat: Tensor) -> Params:
        """Views of a flat vector ``(d,)`` as a dict; no copy."""
        pieces = flat.split(self.sizes)
        return {name: piece.view(s) for name, piece, s in zip(self.names, pieces, self.shapes, strict=True)}

    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """``(start, end, block)`` of every tensor; the tensors of one module are one block (its weight and bias)."""
        modules = [name.rpartition(".")[0] for name in self.names]
        index = {module: i for i, module in enumerate(dict.fromkeys(modules))}
        return tuple((start, end, index[m]) for (start, end), m in zip(self.spans, modules, strict=True))
