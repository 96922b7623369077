"""Claims of the presets that the sweeps were made with, decided by ``hybridfl claims``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridfl import claims_command
from hybridfl.claims_report import Report, as_json, as_sheet, asked, compared, interval
from hybridfl.config import Composer
from hybridfl.errors import HybridflError
from hybridfl.report.rows import Shown
from hybridfl.study import Runs, preset_of, study_of


def verdicts(of: Shown, paths: Sequence[Path], config_dir: Path | None) -> list[dict[str, Any]]:
    """For each preset of the sweeps: its claims with verdicts, intervals and the lines that make what is missing.

    A preset that cannot be composed here, as its config folder is elsewhere, is left out with a warning.
    """
    lines = claims_command.of_sweeps(paths, [])
    if not lines:
        return []
    parser = argparse.ArgumentParser()
    claims_command.add_arguments(parser)
    args = parser.parse_args([])
    args.config_dir = config_dir
    runs, found = Runs(of.runs), []
    with Composer(config_dir) as composer:
        for line in lines:
            preset = preset_of(line)
            try:
                if composer.compose([preset]).config.get("claims"):
                    study = study_of(composer, line)
                    found.append(_told(claims_command.report_of(study, runs, composer, args), args))
            except HybridflError as error:
                of.warn(f"The claims of {preset} are left out: {error}")
    return found


def _told(report: Report, args: argparse.Namespace) -> dict[str, Any]:
    told = as_json(report, args)
    for claim, decision in zip(told["claims"], report.decisions, strict=True):
        claim |= {"compared": compared(decision.claim), "asked": asked(decision.claim)}
        for cell, finding in zip(claim["found"], decision.findings, strict=True):
            cell["text"] = interval(finding)
    lines = [line for line in as_sheet(report, args).caption if line.startswith("Means over")]
    return told | {"caption": lines}
