"""Weights & Biases. Offline runs lie in the run's folder until ``wandb sync`` sends them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hybridfl.trackers import Ending, Tracked, needed


def _wandb() -> Any:
    # The package would report its own errors to its makers.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    return needed("wandb", "wandb")


@dataclass(frozen=True)
class WandB:
    """A W&B run with the name of the run folder as its id, so that a continued run is the same one there.

    Attributes:
        project: of W&B.
        entity: user or team; ``None`` is the account's own.
        mode: ``offline`` writes below ``wandb/`` in the run's folder and needs neither account nor network; ``online``
            sends while the run works.
    """

    project: str = "hybridfl"
    entity: str | None = None
    mode: Literal["offline", "online"] = "offline"

    def check(self) -> None:
        _wandb()

    def open(self, run: Tracked) -> WandBRun:
        return WandBRun(self, run)


class WandBRun:
    """One run under way."""

    def __init__(self, options: WandB, run: Tracked) -> None:
        wandb = _wandb()
        if options.mode == "offline":
            # An offline run cannot be continued; it is written again, from the first round on.
            for before in (run.folder / "wandb").glob(f"offline-run-*-{run.name}"):
                shutil.rmtree(before)
        self.run: Any = wandb.init(
            project=options.project,
            entity=options.entity,
            mode=options.mode,
            id=run.name,
            name=run.title,
            dir=str(run.folder),
            config=dict(run.config),
            resume="allow" if options.mode == "online" else None,
            reinit="finish_previous",
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self.last = max(0, int(self.run.starting_step) - 1) if options.mode == "online" else 0

    def log(self, round: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=round)

    def close(self, ending: Ending) -> None:
        self.run.finish(exit_code=0 if ending == "done" else 1)
