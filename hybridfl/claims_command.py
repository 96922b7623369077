"""``hybridfl claims``: what presets claim, decided from the stored runs.

A claim is about configs, not about folders: each cell and method is composed as ``train`` would, and the stored runs with that
config are its runs, whoever started them. So a missing run is known by the line that makes it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hybridfl.claims import Claim, Interval, decide, evidence
from hybridfl.claims_report import Report, as_json, as_sheet
from hybridfl.config import Composer, choices
from hybridfl.errors import ConfigError, DataError, HybridflError, nearest
from hybridfl.finding import find_runs
from hybridfl.formats import SHEETS
from hybridfl.runs import Run, to_stderr
from hybridfl.statistics import bootstrap_interval, t_interval
from hybridfl.study import Runs, Study, as_typed, preset_of, study_of

FORMATS = (*SHEETS, "json")
INTERVALS: Mapping[str, Interval] = {"t": t_interval, "bootstrap": bootstrap_interval}
EPILOG = """\
A claim is held or failed where the whole interval of its paired difference is on one side of the margin, undecided where the
interval contains it or fewer than two seeds are shared, and missing where there is no run; then the lines that make it follow.

  hybridfl claims feddle_digits                        # a preset, of the runs in outputs
  hybridfl claims outputs/sweeps/<digest>              # the claims of a sweep's preset, with what was typed beside it
  hybridfl claims feddle_fashion rounds=10 my_outputs  # overrides, and a folder to look for runs in
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl claims``."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "what",
        nargs="*",
        metavar="PRESET|PATH|key=value",
        help="presets; run, sweep or output folders; overrides (default: outputs, and the presets of its sweeps)",
    )
    add("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own")
    add("--confidence", type=float, default=0.95, metavar="SHARE", help="of the intervals (default: %(default)s)")
    add("--interval", default="t", metavar="|".join(INTERVALS), help="Student's, or percentiles of resampled means")
    add(
        "--holm",
        action="store_true",
        help="correct for the number of a preset's claims and cells (default: each is read by itself)",
    )
    add("--format", default="terminal", metavar="|".join(FORMATS), help="default: %(default)s")
    add("--json", action="store_true", help="short for --format json")
    add("--strict", action="store_true", help="exit status 1 unless all claims are held")


def run(args: argparse.Namespace, warn: Callable[[str], None] = to_stderr) -> int:
    """Prints the verdicts; the exit status is 1 only with ``--strict`` and a claim that is not held.

    Raises:
        ConfigError: a preset, path, option or claim is wrong.
    """
    how = "json" if args.json else args.format
    for name, given, valid in (("--format", how, FORMATS), ("--interval", args.interval, tuple(INTERVALS))):
        if given not in valid:
            raise ConfigError(name, f"'{given}' is unknown. {nearest(given, valid)}")
    if not 0.5 <= args.confidence < 1:
        raise ConfigError("--confidence", f"got {args.confidence:g}: expected a share in [0.5, 1), such as 0.95.")
    reports = list(_reports(args, warn))
    if how == "json":
        print(json.dumps([as_json(report, args) for report in reports], indent=2, allow_nan=False))
    else:
        print("\n\n".join(SHEETS[how](as_sheet(report, args)) for report in reports))
    held = all(decision.verdict == "held" for report in reports for decision in report.decisions)
    return 0 if held or not args.strict else 1


def _reports(args: argparse.Namespace, warn: Callable[[str], None]) -> Iterator[Report]:
    with Composer(args.config_dir) as composer:
        presets, paths, overrides = _sorted_out(args.what, composer)
        typed = [[f"experiment={name}", *overrides] for name in presets] or of_sweeps(paths, overrides)
        if not typed:
            known = choices("experiment", composer.extra)
            raise ConfigError("preset", f"none is given, and no sweep there has one. {nearest('', known)}")
        for line in typed:
            study = study_of(composer, line)
            if overrides:
                _check_typed(study, composer)
            yield report_of(study, _stored(paths or [study.output], bool(paths), warn), composer, args)


def _check_typed(study: Study, composer: Composer) -> None:
    """Refuse what no run could have: it would be said to be missing, with a line that cannot be run."""
    from hybridfl.plan import settings_of  # torch, which the claims themselves do not need

    settings_of(composer.compose([*study.fixed, "baseline=none"]))


def _sorted_out(what: Sequence[str], composer: Composer) -> tuple[list[str], list[Path], list[str]]:
    """What was typed, as presets, paths and overrides."""
    known = choices("experiment", composer.extra)
    overrides = [text for text in what if "=" in text and not Path(text).exists()]
    presets = [text.partition("=")[2] for text in overrides if text.startswith("experiment=")]
    overrides = [text for text in overrides if not text.startswith("experiment=")]
    paths = []
    for text in what:
        if text in known:
            presets.append(text)
        elif Path(text).is_dir():
            paths.append(Path(text))
        elif "=" not in text or Path(text).exists():
            raise ConfigError(text, f"is no preset and no folder. {nearest(text, known)}")
    if not presets and not paths:
        paths = [Path("outputs")]
    return presets, paths, overrides


def of_sweeps(paths: Sequence[Path], overrides: Sequence[str]) -> list[list[str]]:
    """The lines of sweeps with a preset: whole for a sweep's own folder, the preset alone for those of an output folder."""
    found: list[list[str]] = []
    for path in paths:
        if (path / "overrides.txt").is_file():
            found.append([*_overrides(path), *overrides])
        else:
            sweeps = sorted(path.glob("sweeps/*/overrides.txt"))
            found += [[preset_of(_overrides(file.parent)), *overrides] for file in sweeps]
    return [line for place, line in enumerate(found) if preset_of(line) and line not in found[:place]]


def _overrides(sweep: Path) -> list[str]:
    """What was typed for a sweep, one override a line; in one line it is of an earlier version."""
    file = sweep / "overrides.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{file}: cannot be read ({problem}); the sweep's line makes it anew.") from problem
    return lines if len(lines) > 1 else " ".join(lines).split()


def _stored(paths: Sequence[Path], typed: bool, warn: Callable[[str], None]) -> Runs:
    """The finished runs there are, which may be none.

    Raises:
        ConfigError: a path that was typed is no run, sweep or output folder.
    """
    if not typed and not (paths[0] / "runs").is_dir():
        return Runs([])
    try:
        return Runs(find_runs(paths, warn))
    except ConfigError:
        raise
    except HybridflError:
        return Runs([])


def report_of(study: Study, runs: Runs, composer: Composer, args: argparse.Namespace) -> Report:
    """The decisions on a preset's claims, of these runs and with the options of :func:`add_arguments`.

    Raises:
        ConfigError: a claim names a method, setting or scope that does not exist.
    """
    baselines, methods = choices("baseline", composer.extra), composer.methods()
    memory: dict[tuple[str, ...], list[Run]] = {}

    def of(place: str, method: str, cell: Mapping[str, str], settings: str) -> tuple[tuple[str, ...], list[Run]]:
        """The line of a method in a cell, and the runs it has made."""
        if method not in methods:
            raise ConfigError(place, f"got '{method}', which is no method. {nearest(method, methods)}")
        line = study.line(method, cell, baselines)
        if line not in memory:
            try:
                memory[line] = runs.of(composer, line)
            except ConfigError as error:
                raise error.under(settings) from error
        return line, memory[line]

    found = []
    for number, claim in enumerate(study.claims):
        place, parts = f"claims[{number}]", []
        try:
            cells = study.cells(claim)
        except ConfigError as error:
            raise error.under(place) from error
        for cell in cells:
            other = cell | {key: as_typed(value) for key, value in claim.than_where.items()}
            our_line, ours = of(f"{place}.better", claim.better, cell, f"{place}.where")
            their_line, theirs = of(f"{place}.than", claim.than, other, f"{place}.than_where")
            _check_scopes(place, claim, [*ours, *theirs])
            parts.append(evidence(claim, cell, ours, theirs, (our_line, their_line)))
        found.append((claim, parts))
    return Report(study, decide(found, INTERVALS[args.interval], args.confidence, args.holm))


def _check_scopes(place: str, claim: Claim, runs: Sequence[Run]) -> None:
    scopes = {scope for one in runs for scope in one.curves}
    for key, scope in (("scope", claim.scope), ("than_scope", claim.than_scope)):
        if runs and scope is not None and scope not in scopes:
            raise ConfigError(
                f"{place}.{key}", f"got '{scope}', which no run of the claim has. {nearest(scope, scopes)}"
            )
