"""The command line. Nothing heavy is imported before a command needs it: ``--help`` and ``list`` know no torch."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from hybridfl import __version__
from hybridfl.errors import ConfigError, HybridflError, nearest
from hybridfl.group import INTERRUPTED, Group, World, world_of

if TYPE_CHECKING:
    from hybridfl.config import Composed
    from hybridfl.plan import Plan

OVERRIDES_HELP = """\
Overrides are key=value, as in Hydra: rounds=10 merging.search.steps=20 client_optimizer.lr=0.05
  config groups take the name of a choice: model=cnn baseline=fedavg (see `hybridfl list`)
"""
SWEEP_HELP = """\
  with -m, commas and ranges make a sweep: -m baseline=none,fedavg seed=0,1,2
"""


PACKAGES = {name: name for name in (
    "filelock", "matplotlib", "numpy", "omegaconf", "pandas", "pooch", "requests", "rich", "safetensors", "scipy", "torch",
)} | {"PIL": "pillow", "hydra": "hydra-core", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # fmt: skip
"""What an installation comes with, by the name it is imported by."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0 done, 2 wrong input, 1 anything else, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _reported(lambda: _dispatch(arguments))


def _reported(work: Callable[[], int]) -> int:
    """The exit status of work that may fail; why it did is said on standard error."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except HybridflError as error:
        print(f"hybridfl: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("hybridfl: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone; what Python flushes at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:  # a mistake in the code, the user's or ours: only the traceback tells where
        name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if name in PACKAGES:
            print(
                f"hybridfl: {name}: is not installed, and this needs it: pip install {PACKAGES[name]}", file=sys.stderr
            )
        else:
            traceback.print_exc()
        return 1


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
    return COMMANDS[name][0](rest)


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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a line as all of the program does, in one message that names the argument."""

    def error(self, message: str) -> NoReturn:
        what, _, rest = message.partition(": ")
        if what == "unrecognized arguments":
            name = rest.split()[0].partition("=")[0]
            raise ConfigError(name, self._unknown(name))
        if what.endswith("are required"):
            raise ConfigError(rest, f"is missing; `{self.prog} --help` explains it.")
        if wrong := re.fullmatch(r"invalid choice: '(.*)' \(choose from (.*)\)", rest):
            valid = [choice.strip("'") for choice in wrong[2].split(", ")]
            rest = f"got '{wrong[1]}'. {nearest(wrong[1], valid)}"
        elif wrong := re.fullmatch(r"invalid (float|int) value: ('.*')", rest):
            rest = f"got {wrong[2]}: expected {'a number' if wrong[1] == 'float' else 'a whole number'}."
        raise ConfigError(what.removeprefix("argument "), f"{rest.removesuffix('.')}.")

    def _unknown(self, name: str) -> str:
        if not name.startswith("-"):
            return f"is more than `{self.prog}` takes."
        options = [text for action in self._actions for text in action.option_strings if text.startswith("--")]
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        if not near and name.startswith("--") and any(action.dest == "overrides" for action in self._actions):
            hint = f"A config key has no dashes: {name.lstrip('-')}=VALUE. "
        return f"unknown option of `{self.prog}`. {hint}Valid: {', '.join(sorted(options))}."


def _parser(name: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return _Parser(
        prog=f"hybridfl {name}",
        description=COMMANDS[name][1],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _run_parser(name: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of a command that takes the config of a run."""
    parser = _parser(name, epilog)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own")
    return parser


def _find_users_modules() -> None:
    """A user's method beside the config folder must be found, but never hide an installed module."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _train(arguments: list[str]) -> int:
    parser = _run_parser("train", OVERRIDES_HELP + SWEEP_HELP)
    parser.add_argument("-m", "--multirun", action="store_true", help="run every combination of comma lists")
    parser.add_argument("--dry-run", action="store_true", help="check, show the split and the costs, run nothing")
    chosen = parser.parse_intermixed_args(arguments)
    _find_users_modules()
    with _terminable():
        if world := world_of(os.environ):
            return _in_ranks(chosen, world)
        if chosen.multirun:
            return _sweep(chosen)
        return _single(chosen)


def _composed(chosen: argparse.Namespace, quiet: bool = False) -> Composed:
    from hybridfl.config import Composer
    from hybridfl.sweep_line import refuse_outside

    refuse_outside(chosen.overrides)
    with Composer(chosen.config_dir) as composer:
        composed = composer.compose(chosen.overrides)
    if composed.has_sweep and not quiet:
        print("hybridfl: the preset brings a sweep, which only train -m runs; it is left out here.", file=sys.stderr)
    return composed


def _split(arguments: list[str]) -> int:
    parser = _run_parser("split", OVERRIDES_HELP)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write figures (PNG) and split.json there")
    parser.add_argument("--all", action="store_true", help="show every client, not only the first 20")
    chosen = parser.parse_intermixed_args(arguments)
    _find_users_modules()
    composed = _composed(chosen)
    from hybridfl.split import show

    print(show(composed, chosen.out, chosen.all))
    return 0


def _pretrain(arguments: list[str]) -> int:
    from hybridfl import pretrain_command

    parser = _run_parser("pretrain", pretrain_command.EPILOG)
    pretrain_command.add_arguments(parser)
    chosen = parser.parse_intermixed_args(arguments)
    typed, chosen.overrides = chosen.overrides, pretrain_command.completed(chosen)
    _find_users_modules()
    with _terminable():
        return pretrain_command.run(chosen, typed, _composed(chosen))


def _export(arguments: list[str]) -> int:
    from hybridfl import export_command

    parser = _parser("export")
    export_command.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    _find_users_modules()
    return export_command.run(chosen)


def _single(chosen: argparse.Namespace) -> int:
    composed = _composed(chosen)
    from hybridfl.plan import make_plan

    plan = make_plan(composed)
    return _described(plan) if chosen.dry_run else _done(plan)


def _described(plan: Plan) -> int:
    from hybridfl.describe import describe

    print(describe(plan))
    return 0


def _done(plan: Plan) -> int:
    from hybridfl.experiment import run
    from hybridfl.progress import make_progress

    with make_progress(plan.settings.ui) as progress:
        path = run(plan, progress)
    print(f"run: {path.resolve()}")
    return 0


def _in_ranks(chosen: argparse.Namespace, world: World) -> int:
    """One of several processes that do a run together: rank 0 has the folder, and speaks for all of them."""
    group = Group(world)

    def work() -> int:
        try:
            return together()
        except KeyboardInterrupt:
            if group.rank == 0:
                raise
            raise SystemExit(INTERRUPTED) from None

    def together() -> int:
        plan, backend = group.planned(lambda: _ranked_plan(chosen, world), lambda made: _of_all_ranks(*made))
        executor: Any = plan.settings.executor
        with group.telling():
            if chosen.dry_run:
                return 0 if group.rank else _described(plan)
            executor.join(group, plan.federation.device, backend)
            if group.rank == 0:
                return _done(plan)
            from hybridfl.experiment import follow

            follow(plan)
            return 0

    # What there is to say is said before the others may end, as torchrun ends all when the first has failed.
    status = group.end(_reported(work))
    if group.stuck:
        os._exit(status)
    return status


def _ranked_plan(chosen: argparse.Namespace, world: World) -> tuple[Plan, str]:
    """The plan, and how the ranks exchange tensors."""
    if chosen.multirun:
        problem = f"a sweep is work for one process, and this is one of {world.size}"
        raise ConfigError("-m", f"{problem}; start each of its runs under torchrun, or the sweep without torchrun.")
    composed = _composed(chosen, quiet=world.rank > 0)
    from hybridfl.executors.ranks import Ranks
    from hybridfl.plan import make_plan

    plan = make_plan(composed)
    executor = plan.settings.executor
    if not isinstance(executor, Ranks):
        name = type(executor).__name__.lower()
        problem = (
            f"got {name}, but this is one of {world.size} processes started together (RANK and WORLD_SIZE are set)"
        )
        raise ConfigError("executor", f"{problem}; nearest valid choice: ranks.")
    return plan, executor.backend_for(plan.federation.device, plan.settings.device)


def _of_all_ranks(plan: Plan, backend: str) -> str:
    return f"{plan.digest} on {plan.federation.device.type} with {backend}"


def _sweep(chosen: argparse.Namespace) -> int:
    if chosen.dry_run:
        raise ConfigError("--dry-run", "checks one run; leave out -m. A sweep checks all its jobs before the first.")
    from hybridfl.compare import render
    from hybridfl.sweep import sweep

    finished = sweep(chosen.overrides, chosen.config_dir)
    try:
        print(render([finished.folder]))
    except HybridflError as error:  # nothing finished: the failures have been shown already
        print(f"hybridfl: {error}", file=sys.stderr)
    for text in finished.told:
        print(text)
    if finished.failed:
        print(f"hybridfl: {finished.failed} of the sweep's jobs failed.", file=sys.stderr)
    if finished.left:
        print(
            f"hybridfl: {finished.left} of the sweep's jobs are left; the same line goes on with them.", file=sys.stderr
        )
    print(f"sweep: {finished.folder.resolve()}")
    return 1 if finished.failed or finished.left else 0


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


def _compare(arguments: list[str]) -> int:
    from hybridfl import compare

    parser = _parser("compare")
    compare.add_arguments(parser)
    return compare.run(parser.parse_args(arguments))


def _claims(arguments: list[str]) -> int:
    from hybridfl import claims_command

    parser = _parser("claims", claims_command.EPILOG)
    claims_command.add_arguments(parser)
    chosen = parser.parse_intermixed_args(arguments)
    _find_users_modules()
    return claims_command.run(chosen)


def _report(arguments: list[str]) -> int:
    from hybridfl.report import command

    parser = _parser("report", command.EPILOG)
    command.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    _find_users_modules()
    return command.run(chosen)


def _sweeps(arguments: list[str]) -> int:
    from hybridfl import sweeps_command

    parser = _parser("sweeps")
    sweeps_command.add_arguments(parser)
    return sweeps_command.run(parser.parse_args(arguments))


def _clean(arguments: list[str]) -> int:
    from hybridfl import clean_command

    parser = _parser("clean", clean_command.EPILOG)
    clean_command.add_arguments(parser)
    return clean_command.run(parser.parse_args(arguments))


def _show(arguments: list[str]) -> int:
    from hybridfl import show

    parser = _parser("show")
    show.add_arguments(parser)
    return show.run(parser.parse_args(arguments))


def _track(arguments: list[str]) -> int:
    from hybridfl import track_command

    parser = _parser("track", track_command.EPILOG)
    track_command.add_arguments(parser)
    chosen = parser.parse_intermixed_args(arguments)
    _find_users_modules()
    return track_command.run(chosen)


def _data(arguments: list[str]) -> int:
    from hybridfl import data_command

    parser = _parser("data")
    data_command.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    _find_users_modules()
    with _terminable():
        return data_command.run(chosen)


def _merge(arguments: list[str]) -> int:
    from hybridfl import merge_command

    parser = _parser("merge")
    merge_command.add_arguments(parser)
    chosen = parser.parse_intermixed_args(arguments)
    _find_users_modules()
    return merge_command.run(chosen)


def _list(arguments: list[str]) -> int:
    from hybridfl.config import GROUPS, check_folder, choices

    parser = _parser("list")
    parser.add_argument("group", nargs="?", help="a config group; without it, all of them")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own")
    chosen = parser.parse_args(arguments)
    if chosen.group and chosen.group not in GROUPS:
        raise ConfigError(chosen.group, f"unknown config group. {nearest(chosen.group, GROUPS)}")
    check_folder(chosen.config_dir)
    for group in [chosen.group] if chosen.group else GROUPS:
        found = choices(group, chosen.config_dir)
        width = max(map(len, found), default=0)
        print(group if chosen.group else f"\n{group}")
        for name, file in found.items():
            print(f"  {name:{width}}  {_first_comment(file)}{_of_preset(file) if group == 'experiment' else ''}")
    return 0


def _of_preset(file: Path) -> str:
    """What a preset brings beside settings: claims, and methods with settings of their own."""
    import yaml

    try:
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:  # said when it is used
        return ""
    found = {key: node.get(key) for key in ("claims", "tuned")} if isinstance(node, dict) else {}
    claims, tuned = found.get("claims"), found.get("tuned")
    told = [f"{len(claims)} claim{'s' if len(claims) > 1 else ''}"] if isinstance(claims, list) and claims else []
    told += [f"tuned: {', '.join(map(str, tuned))}"] if isinstance(tuned, dict) and tuned else []
    return f" [{'; '.join(told)}]" if told else ""


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    # Hydra sees `# @package` only above the first ordinary comment, so there it may stand.
    told = next((line for line in lines if not line.startswith("# @package")), "")
    return told.lstrip("# ").strip() if told.startswith("#") else "(no description)"


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "Run an experiment, or with -m a sweep of them."),
    "split": (_split, "Who owns what under a config, without training: a table, and figures with --out."),
    "pretrain": (_pretrain, "Train one model on all the data, and write a file that runs start from."),
    "compare": (_compare, "Tables from finished runs: means over seeds, differences, rounds and bytes to a target."),
    "claims": (_claims, "What presets claim, decided from the stored runs: held, failed, undecided or missing."),
    "report": (_report, "One HTML page of finished runs that works offline: tables, curves, splits, claims, configs."),
    "show": (_show, "What a run was, how far it got and how well it did."),
    "track": (_track, "Finished runs sent to TensorBoard, Weights & Biases or MLflow."),
    "sweeps": (_sweeps, "Which sweeps there are and how far each is, or the jobs of one."),
    "clean": (_clean, "Free disk: remove the checkpoints of finished runs."),
    "export": (_export, "What a run would deploy, as a safetensors file that plain torch loads."),
    "data": (_data, "Which data sets are at hand, and downloads of the public ones."),
    "merge": (
        _merge,
        "Saved models into one, by mean, TIES, SLERP and others; with --on the loss barriers between them.",
    ),
    "list": (_list, "The choices of the config groups."),
}
