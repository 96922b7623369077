"""Hydra with a memory: it parses and merges its files anew for every config, which was a third of the suite's time.

What is typed is still applied by Hydra to every config by itself.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType

_load, _merge = ConfigRepository.load_config, ConfigLoaderImpl._compose_config_from_defaults_list
_loaded: dict[Any, Any] = {}
_merged: dict[Any, Any] = {}


def remember() -> None:
    """From here on a file that has not changed is read once in this process, and a list of files is merged once."""
    ConfigRepository.load_config = load_config
    ConfigLoaderImpl._compose_config_from_defaults_list = merge


def stamp(repository: Any, config_path: str) -> tuple[Any, ...]:
    """What tells a config file and its content apart."""
    source = repository._find_object_source(config_path, ObjectType.CONFIG)
    if source is None or source.scheme() != "file":
        return config_path, source and source.full_path()
    file = Path(source.path) / source._normalize_file_name(config_path)
    found = file.stat()
    return config_path, str(file), found.st_mtime_ns, found.st_size, found.st_ino


def load_config(self: Any, config_path: str) -> Any:
    key = stamp(self, config_path)
    if key not in _loaded:
        _loaded[key] = _load(self, config_path)
    return _loaded[key]


def merge(self: Any, defaults: Any, repo: Any) -> Any:
    key = tuple((repr(one), stamp(repo.delegate, one.config_path)) for one in defaults)
    if key not in _merged:
        # Merging takes nodes over from what was loaded, which must stay as it is.
        _merged[key] = _merge(self, defaults=defaults, repo=copy.deepcopy(repo))
    return copy.deepcopy(_merged[key])
