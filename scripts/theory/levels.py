"""What the probes vary, and how long their runs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]

Line = tuple[str, ...]


@dataclass(frozen=True)
class Levels:
    """What is varied.

    Attributes:
        base: overrides of every run.
        rounds, short: of the runs of T2, T3 and T6, and of those of T1 and T5.
        target: accuracy of T3.
        alphas, delays, cohorts: of T1 and T3.
        sizes: of the atlas, of T1 and T4.
        pairs: data of the server in T5, by name.
        objectives: of T5.
        moments: rounds after which T4 searches.
        examples: numbers of examples that it searches on, out of ``owned`` that nobody trains on.
        draws: how often.
        steps: of a search.
    """

    base: Line
    rounds: int
    short: int
    target: float
    alphas: tuple[float, ...]
    delays: tuple[float, ...]
    cohorts: tuple[int, ...]
    sizes: tuple[int, ...]
    pairs: Mapping[str, Line]
    objectives: tuple[str, ...]
    moments: tuple[int, ...]
    owned: int
    examples: tuple[int, ...]
    draws: int
    steps: int


STYLE = ("server_data=style", "server_data.examples=100")

FULL = Levels(
    base=("experiment=feddle_digits",),
    rounds=60,
    short=40,
    target=0.85,
    alphas=(0.03, 0.1, 1.0, 100.0),
    delays=(0.0, 4.0, 8.0),
    cohorts=(2, 5, 10),
    sizes=(5, 20, 40),
    pairs={
        "same domain": (),
        "blurred": (*STYLE, "server_data.style=blur"),
        "inverted": (*STYLE, "server_data.style=invert"),
        "rotated 90": (*STYLE, "server_data.style=rotate", "server_data.strength=90"),
        "half the classes": ("server_data.classes=[0,1,2,3,4]",),
    },
    objectives=("ce", "kd", "entropy", "head"),
    moments=(20, 30),
    owned=500,
    examples=(20, 50, 100, 200),
    draws=6,
    steps=200,
)

TOY = replace(
    FULL,
    base=(*FULL.base, "clients.number=8", "client_optimizer.steps=2", "model.hidden=[6]", "merging.search.steps=2"),
    rounds=4,
    short=4,
    target=0.1,
    alphas=(0.1, 100.0),
    delays=(4.0,),
    cohorts=(2, 5),
    pairs={name: FULL.pairs[name] for name in ("same domain", "blurred")},
    objectives=("ce", "kd", "head"),
    moments=(2, 4),
    examples=(20, 100),
    draws=1,
    steps=5,
)
