"""Random streams named by what they are for.

A stream depends on (seed, purpose, round, participant, tag, …) and on nothing else: not on the order of calls, the
device, the number of workers, or on whether the run was interrupted.
"""

from __future__ import annotations

import hashlib

import numpy as np


def _entropy(seed: int, purpose: str, keys: tuple[int | str, ...]) -> int:
    text = "\x1f".join([str(seed), purpose, *(f"{type(key).__name__}:{key}" for key in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def stream(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """A generator of its own for ``purpose`` (such as ``"cohort"``) and the given keys."""
    return np.random.Generator(np.random.Philox(key=_entropy(seed, purpose, keys)))


def torch_seed(seed: int, purpose: str, *keys: int | str) -> int:
    """A seed for ``torch.manual_seed`` with the same keying, in ``[0, 2**63)``."""
    return _entropy(seed, purpose, keys) % 2**63
