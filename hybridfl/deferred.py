"""Models of clients in lock-step that are a shared start and products, until somebody reads their weights.

A few steps of gradient descent from weights that all clients share leave ``W + Σ rate · L R`` with one row of ``R`` for each
example that was seen. A mean over the clients needs no client's weights: it is one product over everybody's rows, at a
fraction of the time and memory traffic. Whoever reads a model finds plain tensors, written out when the first is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hybridfl.params import Params


class Product(NamedTuple):
    """``rate · left @ right``, of the first clients of a stack.

    Attributes:
        left: ``(clients, out, rows)``.
        right: ``(clients, rows, in)``.
    """

    left: Tensor
    right: Tensor
    rate: float

    @property
    def rows(self) -> int:
        return self.right.shape[1]


def written(start: Tensor, products: Sequence[Product], clients: int) -> Tensor:
    """``start`` ``(out, in)`` and its products as weights of all clients ``(clients, out, in)``; those without any have the start.

    Args:
        products: at least one, of all clients or, after the first, fewer.
    """
    (left, right, rate), *more = products
    out = start.new_empty(clients, *start.shape)
    torch.baddbmm(start.expand_as(out), left, right, alpha=rate, out=out)
    for left, right, rate in more:
        out[: len(left)].baddbmm_(left, right, alpha=rate)
    return out


def pieces(rows: int, device: torch.device) -> int:
    """In how many a product over so many rows is made: a CPU's threads share pieces better than the rows of one."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return threads if rows % threads == 0 else 1


def apart(stacks: Params, clients: int) -> list[Params]:
    """The tensors of each client, views."""
    parts = {name: stack.unbind() for name, stack in stacks.items()}
    return [{name: own[i] for name, own in parts.items()} for i in range(clients)]


class Stack:
    """Models of several clients.

    Args:
        params: first axis the clients; of those among ``products`` the shared start, expanded.
        products: of what is not written out yet, by name. They are forgotten once it is.
    """

    def __init__(self, params: Params, products: Mapping[str, Sequence[Product]]) -> None:
        self.params, self.products = params, products
        self._models: list[Params] | None = None

    def models(self) -> list[Params]:
        """Each client's tensors, views of the stacks."""
        if self._models is None:
            clients = len(next(iter(self.params.values())))
            for name, products in self.products.items():
                self.params[name] = written(self.params[name][0], products, clients)
            self.products = {}
            self._models = apart(self.params, clients)
        return self._models

    @cached_property
    def nbytes(self) -> int:
        """Of one client's model."""
        return sum(stack[0].nbytes for stack in self.params.values())

    @property
    def is_written(self) -> bool:
        return self._models is not None

    def weighted(self, shares: Sequence[float]) -> Params:
        """``Σ share · model`` over all clients, of a stack that is not written out."""
        out: Params = {}
        for name, stack in self.params.items():
            share = torch.tensor(shares, dtype=stack.dtype, device=stack.device)
            if name not in self.products:
                out[name] = (share @ stack.reshape(len(stack), -1)).view(stack.shape[1:])
                continue
            out[name] = total = stack[0] * share.sum()
            for left, right, rate in self.products[name]:
                # A product over the rows of all clients, one client after the other.
                scaled = left.transpose(1, 2) * share[: len(left)].view(-1, 1, 1)
                parts = pieces(right.shape[0] * right.shape[1], right.device)
                lefts, rights = (part.reshape(parts, -1, part.shape[-1]) for part in (scaled, right))
                total.add_(torch.bmm(lefts.transpose(1, 2), rights).sum(0), alpha=rate)
        return out


class Deferred(NamedTuple):
    """A client's model, in a stack."""

    stack: Stack
    place: int

    def params(self) -> Params:
        return self.stack.models()[self.place]


def mean(models: Sequence[Deferred], shares: Sequence[float]) -> Params:
    """Their weighted mean, without writing any out.

    Args:
        shares: their sum is 1.
    """
    by_stack: dict[Stack, list[float]] = {}
    for (stack, place), share in zip(models, shares, strict=True):
        by_stack.setdefault(stack, [0.0] * len(next(iter(stack.params.values()))))[place] += share
    first, *others = (stack.weighted(own) for stack, own in by_stack.items())
    for other in others:
        for name, tensor in other.items():
            first[name] += tensor
    return first
