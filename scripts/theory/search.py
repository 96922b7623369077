"""A search for coefficients on examples that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridfl import params as P
from hybridfl.merging import atlas as A
from hybridfl.optimizers import Adam
from hybridfl.parametrization import project
from hybridfl.params import Layout
from hybridfl.stateless import run_net
from theory.watching import Moment


class Search:
    """Affine coefficients by Adam on all the examples given, from the mean of what arrived, on normalised anchors."""

    def __init__(self, moment: Moment, entries: Sequence[A.Entry], steps: int) -> None:
        updates = [entry["update"] for entry in entries]
        fresh = [entry["added"] == moment.index for entry in entries]
        self.net, self.model, self.steps = moment.plan.federation.net, moment.model, steps
        self.layout = Layout.of(self.model.params)
        scales, _ = A.scales(updates, fresh, "mean", self.layout)
        self.anchors, self.origin = torch.stack(updates) * scales, P.flatten(self.model.params)
        self.default = torch.tensor([float(f) for f in fresh], dtype=self.origin.dtype).unsqueeze(1) / sum(fresh)

    def value(self, c: Tensor, x: Tensor, y: Tensor) -> Tensor:
        params = self.layout.unflatten(self.origin + c[:, 0] @ self.anchors)
        return F.cross_entropy(run_net(self.net.eval(), params, self.model.buffers, x), y)

    def loss(self, c: Tensor, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return self.value(c, x, y).item()

    def found(self, x: Tensor, y: Tensor, prox: float) -> Tensor:
        one, work = torch.ones(()), Adam(lr=0.02)
        state: dict[str, Any] = {}
        theta = {"c": self.default.clone()}
        for _ in range(self.steps):
            u = theta["c"].detach().requires_grad_()
            c = project(u, "affine", one, 1.0)
            value = self.value(c, x, y) + prox * (c - self.default).square().sum()
            (gradient,) = torch.autograd.grad(value, u)
            work.update(theta, {"c": gradient}, state, {"c": work.lr})
        return project(theta["c"], "affine", one, 1.0)
