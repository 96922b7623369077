"""Nets from config nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hybridfl.build import build
from hybridfl.data.dataset import Dataset
from hybridfl.errors import ConfigError
from hybridfl.local import torch_random
from hybridfl.rng import torch_seed


def build_net(node: Mapping[str, Any], dataset: Dataset, seed: int, width: float = 1.0, name: str = "") -> nn.Module:
    """The net of a model node without the program's own keys, its weights drawn from the run's own stream.

    Args:
        width: a factor on the node's own.
        name: tells further random models apart.

    Raises:
        ConfigError: the node does not fit the data, or has no ``width`` to be made narrower by.
    """
    shape = tuple(dataset.train.x.shape[1:])
    context = {"input_shape": shape, "classes": dataset.classes, "num_classes": dataset.classes}
    if width != 1:
        if "width" not in node:
            raise ConfigError(
                "model", f"has no width, and {width:g} of it is asked for; try model=cnn or model=resnet20."
            )
        node = {**node, "width": node["width"] * width}
    keys = () if width == 1 and not name else (f"{width:.6g}", name)
    with torch_random(torch_seed(seed, "initial weights", *keys), torch.device("cpu")):
        net = build(node, "model", context)
    if not isinstance(net, nn.Module):
        raise ConfigError("model._target_", f"gives a {type(net).__name__}, expected a torch.nn.Module.")
    return net
