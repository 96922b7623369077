"""Nested widths: a narrow net's tensors are the first entries, along every axis, of the wide net's.

Yu, Yang, Xu, Yang, Huang 2019 (slimmable networks), arXiv 1812.08928; Diao, Ding, Tarokh 2021 (HeteroFL), arXiv 2010.01264,
section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybridfl.params import Params

Shapes = Mapping[str, Sequence[int]]


def sliced(params: Mapping[str, Tensor], shapes: Shapes) -> Params:
    """The first entries of every tensor, in the shapes of a narrower net; views, no copies."""
    return {name: tensor[_corner(shapes[name])] for name, tensor in params.items()}


def overlap_mean(old: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Params:
    """Every entry is the weighted mean over the parts that have it; entries that no part has keep their old value.

    Args:
        old: the wide tensors.
        parts: slices of them, each of its own width.
        weights: of the parts.
    """
    out: Params = {}
    for name, tensor in old.items():
        if not tensor.is_floating_point():
            out[name] = torch.stack([tensor, *(part[name] for part in parts)]).amax(0)
            continue
        total, mass = torch.zeros_like(tensor), torch.zeros_like(tensor)
        for part, weight in zip(parts, weights, strict=True):
            corner = _corner(part[name].shape)
            total[corner] += weight * part[name]
            mass[corner] += weight
        out[name] = torch.where(mass > 0, total / mass.clamp_min(torch.finfo(mass.dtype).tiny), tensor)
    return out


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)
