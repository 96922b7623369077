"""``hybridfl show RUN``: what a run was, how far it got and how well it did."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from hybridfl.finding import find_run
from hybridfl.forgetting import forgetting, forgetting_learned
from hybridfl.runs import ABSENT, BYTES, COSTS, Run
from hybridfl.store import is_held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl show``."""
    parser.add_argument("run", metavar="RUN", help="a run folder, its digest, or the beginning of the digest")
    parser.add_argument("--output-dir", default="outputs", help="where runs/ is (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the run and returns the exit status."""
    print(describe(find_run(args.run, Path(args.output_dir))))
    return 0


def describe(shown: Run) -> str:
    """What one wants to know about a run: what it was, how far it came, its last numbers, where its files are."""
    method = shown.value("method")
    split, error = shown.status.get("split"), shown.status.get("error")
    facts = {
        "run": shown.folder.name,
        "method": "unknown" if method is ABSENT else method,
        "overrides": shown.config.get("overrides") or "(none)",
        "status": f"{_state(shown)}, round {shown.status.get('round', 0)} of {shown.status.get('rounds', '?')}",
        "error": error,
        "split": split,
        **_costs(shown),
        "folder": shown.folder,
        "files": ", ".join(_file_names(shown.folder)),
    }
    width = max(map(len, facts))
    lines = [_fact(name, str(value), width) for name, value in facts.items() if value not in (None, "")]
    return "\n".join([*lines, "", *_last_metrics(shown), *_stream(shown)])


def _state(shown: Run) -> str:
    """The status; a killed process could not say that it stopped."""
    if shown.state == "running" and not is_held(shown.folder):
        return "stopped (the same command continues it)"
    return shown.state


def _fact(name: str, value: str, width: int) -> str:
    """``name  value``, further lines (of a traceback) under the first."""
    return f"{name:<{width}}  " + value.strip().replace("\n", "\n" + " " * (width + 2))


def _file_names(folder: Path) -> list[str]:
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name[0] != ".")


def _costs(shown: Run) -> dict[str, str]:
    """The costs until the last evaluation, in every scope the same."""
    last = max(shown.curves.values(), key=lambda curve: curve.rounds[-1], default=None)
    if last is None:
        return {}
    cost = {name: last.column(name)[-1] for name in COSTS}
    texts = {
        "bytes": ", ".join(f"{cost[name] / 1e6:.6g} MB {name[6:]}" for name in BYTES if math.isfinite(cost[name])),
        "compute": ", ".join(
            f"{cost[name]:.4g} {name.replace('_', ' ').replace('macs', 'MACs')}"
            for name in ("macs", "server_macs", "local_steps")
            if math.isfinite(cost[name])
        ),
        "time": ", ".join(
            f"{cost[name]:.1f} s{simulated}"
            for name, simulated in (("seconds", ""), ("sim_seconds", " simulated"))
            if math.isfinite(cost[name])
        ),
    }
    return texts


def _last_metrics(shown: Run) -> list[str]:
    """The last evaluation of every scope as lines of a table; accuracies in percent, the rest raw."""
    if not shown.curves:
        return ["no evaluation yet"]
    percent, plain = ("accuracy", "worst10", "spread"), ("loss", "examples")
    table = [["scope", "round", *(f"{name} %" for name in percent), *plain]]
    kinds = list(dict.fromkeys(scope.partition("/")[0] for scope in shown.curves))
    # In the file a task's rows begin when it does, after all others.
    for scope in sorted(shown.curves, key=lambda scope: (kinds.index(scope.partition("/")[0]), "/task=" in scope)):
        curve = shown.curves[scope]
        rates = [_cell(curve.column(name)[-1] * 100, ".1f") for name in percent]
        table.append([scope, str(curve.rounds[-1]), *rates, *(_cell(curve.column(n)[-1], ".6g") for n in plain)])
    return _aligned(table)


def _stream(shown: Run) -> list[str]:
    """Of a stream the accuracies after each task that is over, their averages, and what has been forgotten."""
    scope = next((scope for scope in ("global", "served") if f"{scope}/task=0" in shown.curves), None)
    if scope is None:
        return []
    matrix, number = shown.matrix(scope), len(shown.tasks)
    if not matrix:
        return ["", f"the first of {number} tasks is not over yet"]
    overall = _after_tasks(shown, scope), _after_tasks(shown, f"{scope}/tasks")
    table = [["after", *(f"task={task}" for task in range(len(matrix))), "all examples", "all tasks"]]
    for task, row in enumerate(matrix):
        later = [""] * (len(matrix) - len(row))
        averages = [_percent(values[task]) for values in overall]
        table.append([f"task={task}", *map(_percent, row), *later, *averages])
    final = (
        "final average accuracy" if len(matrix) == number else f"average accuracy after {len(matrix)} of {number} tasks"
    )
    means = {final: f"{_percent(overall[0][-1])} over examples, {_percent(overall[1][-1])} over tasks"}
    if len(matrix) > 1:
        best, learned = _percent(forgetting(matrix)), _percent(forgetting_learned(matrix))
        means["forgetting"] = f"{best} from the best accuracy on a task, {learned} from the one just after learning it"
    width = max(map(len, means))
    title = f"accuracy % of {scope} after each task (rows) on each task (columns)"
    return ["", title, *_aligned(table), *(_fact(name, value, width) for name, value in means.items())]


def _after_tasks(shown: Run, scope: str) -> list[float]:
    """Accuracy after each task that is over; NaN where that was not evaluated."""
    curve = shown.curves[scope]
    found = dict(zip(curve.rounds, curve.column("accuracy"), strict=True))
    return [found.get(round + 1, math.nan) for round in range(curve.rounds[-1]) if shown.tasks.ends(round)]


def _percent(value: float) -> str:
    return _cell(100 * value, ".1f")


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]).rstrip() for r in table]


def _cell(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
