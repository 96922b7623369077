"""What modules of a net are given: their inputs, read through hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hybridfl.errors import nearest
from hybridfl.types import Model


def activations(net: nn.Module, model: Model, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """First inputs of the named modules when ``net`` runs with a model's weights on ``x``.

    In evaluation mode and without gradient; the hooks are gone afterwards, whatever happens.

    Args:
        net: a template; its own tensors are not used.
        x: inputs ``(b, …)``.
        names: as in ``net.named_modules()``; what is named twice is read once.

    Returns:
        By name, in the order of ``names``, ``(b, …)``: copies, which later in-place operations do not change.

    Raises:
        ValueError: there is no module of that name, or it does not run exactly once.
    """
    wanted = list(dict.fromkeys(names))
    modules = dict(net.named_modules())
    for name in wanted:
        if name not in modules:
            raise ValueError(f"no module '{name}'. {nearest(name, filter(None, modules))}")
    seen: dict[str, Tensor] = {}
    runs: Counter[str] = Counter()

    def reader(name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = (args[0] if args else next(iter(kwargs.values()))).clone()
            runs[name] += 1

        return read

    hooks = [modules[name].register_forward_pre_hook(reader(name), with_kwargs=True) for name in wanted]
    net.eval()
    try:
        with torch.no_grad():
            torch.func.functional_call(net, {**model.params, **model.buffers}, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    for name in wanted:
        if runs[name] != 1:
            raise ValueError(f"module '{name}' ran {runs[name]} times in a pass, expected once")
    return {name: seen[name] for name in wanted}
