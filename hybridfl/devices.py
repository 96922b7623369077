"""Devices by their config names."""

from __future__ import annotations

import torch

from hybridfl.errors import ConfigError, nearest


def device_of(name: str) -> torch.device:
    """The device by its config name.

    Raises:
        ConfigError: unknown, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError("device", f"got '{name}'. {nearest(name, ('auto', 'cpu', 'cuda', 'cuda:1'))}")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("device", f"got '{name}': {reason}; nearest valid choice: cpu.") from error
    return device
