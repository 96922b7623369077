"""``hybridfl pretrain``: one model trained on all labelled training data of a config, and a file that runs start from.

It is the run of the oracle with a single client that owns everything; so a round is ``client_optimizer.epochs`` passes over
the data, and what runs have, such as schedules, augmentation and going on where one stopped, it has too.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from hybridfl.errors import ConfigError
from hybridfl.overrides import add_overrides, composed_of

if TYPE_CHECKING:
    from hybridfl.plan import Plan

SETTING = {
    "clients.number": "1",
    "clients.per_round": "1",
    "partitioning": "iid",
    "server_data": "none",
    "client_optimizer.epochs": "1",
}
"""Unless typed otherwise: one client that owns everything, and a round is an epoch."""
METHOD = "baseline=oracle"
REFUSED = {
    "baseline": f"pretrain trains one model on all data, as {METHOD} does; leave it out, or use train and export.",
    "merging": f"pretrain trains one model on all data, as {METHOD} does; leave it out, or use train and export.",
    "experiment": "a preset is of a federation; type what you want of it, such as dataset=digits model=cnn.",
}

EPILOG = f"""\
Overrides are those of train, without {", ".join(REFUSED)}. Unless typed otherwise, one client owns everything and a round
is an epoch: {" ".join(f"{key}={value}" for key, value in SETTING.items())}
The same line again trains nothing and writes the file anew; one that was stopped goes on.

  hybridfl pretrain dataset=cifar100 classes=50-99 model=vit rounds=20 -o backbone.safetensors
  hybridfl train dataset=cifar100 classes=0-49 model=vit start=backbone.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl pretrain``."""
    parser.epilog = EPILOG
    add_overrides(parser)
    add = parser.add_argument
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="what to write, such as backbone.safetensors")
    add("--head", action="store_true", help="write the classifier too, the tensors named head.*")
    add("-m", "--multirun", action="store_true", help=argparse.SUPPRESS)


def completed(args: argparse.Namespace) -> list[str]:
    """The overrides of the run, those typed last.

    Raises:
        ConfigError: what is asked for cannot be given.
    """
    if args.multirun:
        raise ConfigError("-m", "pretrain makes one model and one file; leave it out, and call it once for each.")
    typed = [text.lstrip("+~").partition("=")[0].partition("@")[0] for text in args.overrides]
    for key in typed:
        if problem := REFUSED.get(key.partition(".")[0]):
            raise ConfigError(key, problem)
    defaults = [f"{key}={value}" for key, value in SETTING.items() if key not in typed]
    return [METHOD, *defaults, *args.overrides]


def run(args: argparse.Namespace) -> int:
    """Trains, or finds it done, writes the file and returns the exit status."""
    typed, args.overrides = args.overrides, completed(args)
    composed = composed_of(args)
    from hybridfl import experiment
    from hybridfl.exported import described, exported, write_exported
    from hybridfl.plan import make_plan
    from hybridfl.progress import make_progress

    described(args.out)
    plan = make_plan(composed)
    if not args.head:
        _check_head(plan)
    with make_progress(plan.settings.ui) as progress:
        folder = experiment.run(plan, progress)
    from hybridfl.export_command import accuracy
    from hybridfl.models.files import HEAD
    from hybridfl.restored import snapshot_of
    from hybridfl.runs import read_run

    done = read_run(folder)
    snapshot = snapshot_of(done, plan)
    export = exported(plan, snapshot)
    print(f"run: {folder.resolve()}")
    print(write_exported(args.out, export if args.head else export.without(HEAD)))
    print(f"trained on {_examples(plan)} examples for {snapshot.round} rounds{accuracy(done, snapshot.round)}")
    model = [text for text in typed if text.partition("=")[0].partition(".")[0] == "model"]
    print(f"runs start from it with: {shlex.join([*model, f'start={args.out}'])}")
    return 0


def _examples(plan: Plan) -> int:
    return sum(plan.federation.examples(participant) for participant in plan.federation.labelled)


def _check_head(plan: Plan) -> None:
    """Refuse a net whose classifier cannot be told from the rest.

    Raises:
        ConfigError: none of its tensors is called so, or all of them are.
    """
    from hybridfl.models.files import HEAD

    names = [name for part in plan.federation.start for name in part]
    rest = [name for name in names if not name.startswith(HEAD)]
    if len(rest) == len(names):
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
        problem = f"has no tensors named {HEAD}* to leave out, but {parts}; with --head everything is written."
        raise ConfigError("model", problem)
    if not rest:
        raise ConfigError("model", f"has no tensors but {HEAD}*; with --head they are written.")
