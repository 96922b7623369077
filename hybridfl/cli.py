"""The command line. Nothing heavy is imported before a command needs it: ``--help`` and ``list`` know no torch."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

from hybridfl import __version__
from hybridfl.command_parser import Parser
from hybridfl.command_status import reported
from hybridfl.errors import ConfigError, nearest

COMMANDS = {
    "train": ("train_command", "Run an experiment, or with -m a sweep of them."),
    "split": ("split_command", "Who owns what under a config, without training: a table, and figures with --out."),
    "pretrain": ("pretrain_command", "Train one model on all the data, and write a file that runs start from."),
    "compare": ("compare", "Tables from finished runs: means over seeds, differences, rounds and bytes to a target."),
    "claims": (
        "claims_command",
        "What presets claim, decided from the stored runs: held, failed, undecided or missing.",
    ),
    "report": (
        "report.command",
        "One HTML page of finished runs that works offline: tables, curves, splits, claims, configs.",
    ),
    "show": ("show", "What a run was, how far it got and how well it did."),
    "track": ("track_command", "Finished runs sent to TensorBoard, Weights & Biases or MLflow."),
    "sweeps": ("sweeps_command", "Which sweeps there are and how far each is, or the jobs of one."),
    "clean": ("clean_command", "Free disk: remove the checkpoints of finished runs."),
    "export": ("export_command", "What a run would deploy, as a safetensors file that plain torch loads."),
    "data": ("data_command", "Which data sets are at hand, and downloads of the public ones."),
    "merge": (
        "merge_command",
        "Saved models into one, by mean, TIES, SLERP and others; with --on the loss barriers between them.",
    ),
    "list": ("list_command", "The choices of the config groups."),
}
"""Of each command: the module with its ``add_arguments(parser)`` and ``run(arguments) -> exit status``, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0 done, 2 wrong input, 1 anything else, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return reported(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"hybridfl {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise ConfigError(name, f"unknown command. {nearest(name, COMMANDS)}")
    module, summary = COMMANDS[name]
    command: Any = import_module(f"hybridfl.{module}")
    parser = Parser(prog=f"hybridfl {name}", description=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    chosen = parser.parse(rest)
    _find_users_modules()
    with _terminable():
        status: int = command.run(chosen)
    return status


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hybridfl COMMAND …",
            "",
            "Hybrid data learning: clients with private data and a server with a little of its own.",
            "",
            *lines,
            "",
            "hybridfl COMMAND --help explains a command.",
        ]
    )


def _find_users_modules() -> None:
    """A user's method beside the config folder must be found, but never hide an installed module."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that a checkpoint is written."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
